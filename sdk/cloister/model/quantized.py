"""Quantized stand-ins for the linear layers and the embedding of a decoder, for eager use.

They compute what the exported program computes, rounding of activations included, so that an
export can be checked against them. Parameters are named `weight.q` and `weight.scale`, or
`weight.blocks`, as in the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.model.blocks import Blocks
from cloister_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.blocks import FileTypes
    from cloister.model.recipe import Recipe, Scheme
    from cloister.model.transformer import Decoder

__all__ = ["PARTS", "BlockEmbedding", "BlockLinear", "BlockWeight", "QuantizedEmbedding",
           "QuantizedLinear", "QuantizedWeight", "scale_dtype", "swap"]

PARTS = (".q", ".scale", ".blocks")  # ends of the names of what is stored of a quantized matrix
_WEIGHTS = 2**20  # dequantized at a time


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


class BlockWeight(nn.Module):
    """One matrix in blocks of a GGUF file: uint8[N, bytes]."""

    blocks: torch.Tensor

    def __init__(self, rows: int, inputs: int, scheme: Blocks) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer(
            "blocks", torch.zeros(rows, scheme.row_bytes(inputs), dtype=torch.uint8))


class BlockLinear(nn.Module):
    """Linear layer on activations rounded in groups, and weights in blocks of a GGUF file."""

    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, scheme: Blocks, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.weight = BlockWeight(out_features, in_features, scheme)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32[..., K] -> float32[..., N]."""
        rows = reference.round_groups(x.reshape(-1, self.in_features))
        out = torch.cat([
            functional.linear(rows, self.scheme.dequantize(some))
            for some in self.weight.blocks.split(max(1, _WEIGHTS // self.in_features))], dim=1)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


class BlockEmbedding(nn.Module):
    """Embedding with rows in blocks of a GGUF file."""

    def __init__(self, rows: int, size: int, scheme: Blocks) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight = BlockWeight(rows, size, scheme)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map int64[...] -> float32[..., D]."""
        rows = self.scheme.dequantize(self.weight.blocks[tokens.flatten()])
        return rows.view(*tokens.shape, -1)


def swap(decoder: Decoder, schemes: Recipe | FileTypes) -> None:
    """Replace each matrix module of `decoder` by its quantized stand-in, still without values.

    Embedding and head become separate, whether or not they were tied.
    """
    for name, module in list(decoder.named_modules()):
        scheme = schemes.scheme_of(f"{name}.weight")
        if scheme is not None and isinstance(module, nn.Linear | nn.Embedding):
            with torch.device(module.weight.device):
                decoder.set_submodule(name, _stand_in(module, scheme))


def _stand_in(module: nn.Linear | nn.Embedding, scheme: Scheme | Blocks) -> nn.Module:
    rows, inputs = module.weight.shape
    if isinstance(module, nn.Embedding):
        return BlockEmbedding(rows, inputs, scheme) if isinstance(scheme, Blocks) else (
            QuantizedEmbedding(rows, inputs, scheme))
    bias = module.bias is not None
    return BlockLinear(inputs, rows, scheme, bias=bias) if isinstance(scheme, Blocks) else (
        QuantizedLinear(inputs, rows, scheme, bias=bias))
