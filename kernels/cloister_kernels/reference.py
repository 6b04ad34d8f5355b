"""The operators in plain torch, against which every implementation is tested.

Shapes: M rows, K inputs, N outputs, C groups of K / C inputs each.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch.nn import functional

__all__ = ["LEAST_SCALE", "dequantize", "fake_quantize_rows", "linear_8da", "pack_4bit",
           "pack_4bit_embedding"]

# Smallest scale. XNNPACK has none: one as small as this leaves every row its own scale.
LEAST_SCALE = torch.finfo(torch.float32).smallest_normal
_WEIGHTS = 2**20  # dequantized at a time: they stay in the processor's cache


def fake_quantize_rows(x_MK: torch.Tensor) -> torch.Tensor:
    """Round each row to 8 bits and back, float32[M, K] -> float32[M, K].

    Asymmetric, with zero represented exactly, 255 steps over the row's range: the dynamic
    quantization of activations in XNNPACK (`qd8`) and in torchao (`per_token`).
    """
    low = x_MK.amin(-1, keepdim=True).clamp(max=0)
    high = x_MK.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=LEAST_SCALE)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    quantized = ((x_MK * (1 / scale)).round() + zero).clamp(-128, 127)
    return (quantized - zero) * scale


def dequantize(q_NK: torch.Tensor, scale_NC: torch.Tensor) -> torch.Tensor:
    """Return weights from integers and scales, int8[N, K] and [N, C] -> float32[N, K]."""
    rows, groups = scale_NC.shape
    weights = q_NK.float().view(rows, groups, -1) * scale_NC.float().unsqueeze(-1)
    return weights.view(rows, -1)


def linear_8da(
    x_MK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """Multiply 8-bit activations by integer weights, float32[M, K] -> float32[M, N]."""
    x_MK, rows = fake_quantize_rows(x_MK), max(1, _WEIGHTS // x_MK.shape[1])
    biases = repeat(None) if bias_N is None else bias_N.split(rows)
    return torch.cat([
        functional.linear(x_MK, dequantize(q_RK, scale_RC), bias_R)
        for q_RK, scale_RC, bias_R in zip(
            q_NK.split(rows), scale_NC.split(rows), biases, strict=False)
    ], dim=1)


def pack_4bit(q_NK: torch.Tensor) -> torch.Tensor:
    """Pack two weights a byte, plus 8 each, even inputs low: int8[N, K] -> uint8[N, K/2].

    The layout of linear weights in XNNPACK.
    """
    shifted = (q_NK + 8).view(torch.uint8)
    return shifted[:, 1::2] << 4 | shifted[:, ::2]


def pack_4bit_embedding(q_NK: torch.Tensor) -> torch.Tensor:
    """Pack as `pack_4bit`, but even inputs high: ExecuTorch's `embedding_4bit`."""
    shifted = (q_NK + 8).view(torch.uint8)
    return shifted[:, ::2] << 4 | shifted[:, 1::2]
