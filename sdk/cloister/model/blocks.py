"""Matrices in the blocks in which a GGUF file holds them: types, values, and types of a model.

A block is some integers of a row with their scales (ggml-common.h in llama.cpp).

Shapes: N rows (outputs), K inputs, B bytes of a row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HALVES", "Blocks", "FileTypes", "dequantize"]

# The types that Cloister's own operators compute with, and the bytes of a block at which its 16-bit
# scales and minima begin.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
_VALUES = 1 << 18  # dequantized at a time


def dequantize(raw: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> torch.Tensor:
    """Return the values of bytes of any type, float32[values].

    Some blocks at a time: what the library makes in between is large.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.view(np.ndarray).reshape(-1, block_bytes)
    values = np.empty(len(blocks) * block, np.float32)
    step = _VALUES // block
    for start in range(0, len(blocks), step):
        some = blocks[start:start + step].reshape(1, -1)  # one row, which it does in one go
        values[start * block:(start + step) * block] = quants.dequantize(some, kind)[0]
    return torch.from_numpy(values)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The layout of one matrix, by ggml's name of the type.

    Raises:
        SettingError: a type that no operator computes with.
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in HALVES:
            raise SettingError(
                f"Blocks of type {self.kind[:20]} have no operators; these have: "
                f"{', '.join(HALVES)}.")

    def row_bytes(self, inputs: int) -> int:
        """Return the bytes of a row of `inputs`.

        Raises:
            SettingError: they do not divide into blocks.
        """
        block, block_bytes = GGML_QUANT_SIZES[self._type]
        if inputs % block:
            raise SettingError(
                f"A row of {inputs} inputs does not divide into {self.kind}'s blocks of {block}.")
        return inputs // block * block_bytes

    def dequantize(self, blocks_NB: torch.Tensor) -> torch.Tensor:
        """Return the weights, uint8[N, B] -> float32[N, K]."""
        values = dequantize(blocks_NB.cpu().numpy(), self._type)
        return values.view(len(blocks_NB), -1).to(blocks_NB.device)

    def scales(self, blocks_NB: torch.Tensor) -> torch.Tensor:
        """Return the scales and minima of every block, float16[blocks, halves].

        Where all are finite every weight is.
        """
        blocks = blocks_NB.view(-1, GGML_QUANT_SIZES[self._type][1])
        return torch.cat([
            blocks[:, first:first + 2].contiguous().view(torch.float16)
            for first in HALVES[self.kind]], dim=1)

    @property
    def _type(self) -> GGMLQuantizationType:
        return GGMLQuantizationType[self.kind]


@dataclass(frozen=True, kw_only=True)
class FileTypes:
    """The types of a GGUF file's matrices, which a checkpoint keeps in place of a recipe's."""

    by_tensor: Mapping[str, str]  # without a head it is the embedding

    @property
    def name(self) -> str:
        """What a checkpoint, a manifest and a receipt say in place of a recipe.

        `gguf-q4_k-q6_k` is mostly Q4_K; behind `-e` stands the type of an embedding of its own.
        """
        counts = Counter(self.by_tensor.values())
        kinds = [kind.lower() for kind in sorted(counts, key=lambda kind: (-counts[kind], kind))]
        embedding = self.by_tensor.get("embed.weight")
        if "head.weight" in self.by_tensor and embedding is not None:
            kinds.append(f"e{embedding.lower()}")
        return "-".join(("gguf", *kinds))

    def scheme_of(self, tensor: str) -> Blocks | None:
        """Return the layout of the tensor called `tensor`, or None where it is no matrix."""
        if tensor == "head.weight" and tensor not in self.by_tensor:
            tensor = "embed.weight"
        kind = self.by_tensor.get(tensor)
        return None if kind is None else Blocks(kind=kind)
