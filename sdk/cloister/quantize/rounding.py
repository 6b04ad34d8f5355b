"""The rounding of one matrix by itself, as torchao makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from cloister.model.quantized import scale_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloister.model.recipe import Scheme

__all__ = ["quantize_weight", "stored_tensors"]


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers int8[N, K] and scales [N, C] of `weight`, float32[N, K].

    Symmetric, the scale set by the largest entry of a group (torchao's affine choice, which
    quantization-aware training uses too).
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"),
        weight_granularity=PerAxis(0) if scheme.group is None else PerGroup(scheme.group),
        weight_scale_dtype=scale_dtype(scheme),
    ))
    quantized: Any = layer.weight  # torchao's tensor
    return quantized.qdata, quantized.scale


def stored_tensors(
    name: str, value: torch.Tensor, scheme: Scheme | None, scale: torch.Tensor | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a checkpoint stores of `value`: itself, or where it has a scheme two parts.

    With `scale`, [N, C], the integers are those that `qat.round_weight` makes with it.
    """
    if scheme is None:
        yield name, value
        return
    if scale is None:
        q, scale = quantize_weight(value, scheme)
    else:
        groups, most = value.unflatten(1, (scale.shape[1], -1)), 2 ** (scheme.bits - 1)
        integers = (groups * (1.0 / scale.float().unsqueeze(-1))).round_().clamp_(-most, most - 1)
        q = integers.flatten(1).to(torch.int8)
    yield f"{name}.q", q
    yield f"{name}.scale", scale
