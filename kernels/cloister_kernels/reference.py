"""The operators in plain torch, against which every implementation is tested.

Shapes: M rows, K inputs, N outputs, C groups of K / C inputs each.
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GROUP", "LEAST_SCALE", "attention", "dequantize", "fake_quantize_rows", "linear_8da",
           "pack_4bit", "pack_4bit_embedding", "round_cache", "round_groups"]

GROUP = 32  # inputs that share a scale

# Smallest scale. XNNPACK has none: one as small as this leaves every row its own scale.
LEAST_SCALE = torch.finfo(torch.float32).smallest_normal
_NO_GROUP = 1e-36  # a largest magnitude that counts as 0
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


def round_groups(x_MK: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
    """Round each 32 inputs of a row to 8 bits and back, float32[M, K] -> float32[M, K].

    Symmetric, 127 steps to the largest magnitude; with `whole` that of the row. What the operator
    `linear` does with its input. A row with an entry that is not finite becomes NaN.
    """
    rows, inputs = x_MK.shape
    groups = functional.pad(x_MK, (0, -inputs % GROUP)).view(rows, -1, GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    if whole:
        most = most.amax(1, keepdim=True)
    # A scalar would be multiplied by a reciprocal, which rounds otherwise.
    inverse = torch.where(most > _NO_GROUP, most.new_tensor(127.0) / most, 0.0)
    rounded = ((groups * inverse).round() * (most / 127)).view(rows, -1)[:, :inputs]
    return torch.where(x_MK.isfinite().all(1, keepdim=True), rounded, torch.nan)


def round_cache(x_TGD: torch.Tensor) -> torch.Tensor:
    """Round keys or values to 8 bits and back, a scale for each head at each position."""
    scale = x_TGD.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (x_TGD * inverse).round() * scale


def attention(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, start: int, *, scale: float,
    softcap: float = 0.0, window: int = 0
) -> torch.Tensor:
    """Attend from positions `start` to S - 1 to those before them, -> float32[T, H, D].

    Keys and values of all S positions are in float32 here, whatever the cache holds.
    """
    length, heads, _ = q_THD.shape
    k_SHD, v_SHD = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k_SGD, v_SGD))
    scores = torch.einsum("thd,shd->hts", q_THD, k_SHD) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query, key = torch.arange(start, start + length)[:, None], torch.arange(len(k_SGD))
    seen = (key <= query) & (key > query - window if window else key >= 0)
    return torch.einsum(
        "hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v_SHD)


def dequantize(q_NK: torch.Tensor, scale_NC: torch.Tensor) -> torch.Tensor:
    """Return weights from integers and scales, int8[N, K] and [N, C] -> float32[N, K]."""
    rows, groups = scale_NC.shape
    weights = q_NK.float().view(rows, groups, -1) * scale_NC.float().unsqueeze(-1)
    return weights.view(rows, -1)


def linear_8da(
    x_MK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, bias_N: torch.Tensor | None,
    rounded: Callable[[torch.Tensor], torch.Tensor] = fake_quantize_rows
) -> torch.Tensor:
    """Multiply 8-bit activations by integer weights, float32[M, K] -> float32[M, N]."""
    x_MK, rows = rounded(x_MK), max(1, _WEIGHTS // x_MK.shape[1])
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
