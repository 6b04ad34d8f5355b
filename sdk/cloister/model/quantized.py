"""Quantized stand-ins for the linear layers and the embedding of a decoder, for eager use.

They compute what the exported program computes, rounding of activations included, so that an
export can be checked against them. Parameters are named `weight.q` and `weight.scale`, as in the
checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from cloister_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.recipe import Recipe, Scheme
    from cloister.model.transformer import Decoder

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "QuantizedWeight", "scale_dtype", "swap"]


def scale_dtype(scheme: Scheme) -> torch.dtype:
    """Return the type of the scales of `scheme`."""
    return torch.float32 if scheme.group is None else torch.bfloat16


class QuantizedWeight(nn.Module):
    """Integers and scales of one matrix: q int8[N, K], scale [N, C]."""

    q: torch.Tensor
    scale: torch.Tensor

    def __init__(self, rows: int, inputs: int, scheme: Scheme) -> None:
        super().__init__()
        self.register_buffer("q", torch.zeros(rows, inputs, dtype=torch.int8))
        self.register_buffer(
            "scale", torch.zeros(rows, scheme.groups(inputs), dtype=scale_dtype(scheme))
        )


class QuantizedLinear(nn.Module):
    """Linear layer on 8-bit dynamic activations and integer weights."""

    bias: torch.Tensor | None
    rounded: Callable[[torch.Tensor], torch.Tensor]  # what is done to activations

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = QuantizedWeight(out_features, in_features, scheme)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.rounded = reference.fake_quantize_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32[..., K] -> float32[..., N]."""
        rows = x.reshape(-1, self.in_features)
        out = reference.linear_8da(
            rows, self.weight.q, self.weight.scale, self.bias, self.rounded)
        return out.view(*x.shape[:-1], self.out_features)


class QuantizedEmbedding(nn.Module):
    """Embedding with integer rows."""

    def __init__(self, rows: int, size: int, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight = QuantizedWeight(rows, size, scheme)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map int64[...] -> float32[..., D]."""
        flat = tokens.flatten()
        rows = reference.dequantize(self.weight.q[flat], self.weight.scale[flat])
        return rows.view(*tokens.shape, -1)


def swap(decoder: Decoder, recipe: Recipe) -> None:
    """Replace each matrix module of `decoder` by its quantized stand-in, still without values.

    Embedding and head become separate, whether or not they were tied.
    """
    for name, module in list(decoder.named_modules()):
        scheme = recipe.scheme_of(f"{name}.weight")
        if scheme is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        rows, inputs = module.weight.shape
        with torch.device(module.weight.device):
            decoder.set_submodule(
                name, QuantizedLinear(inputs, rows, scheme, bias=module.bias is not None)
                if isinstance(module, nn.Linear) else QuantizedEmbedding(rows, inputs, scheme))
