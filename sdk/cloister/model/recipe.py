"""Quantization recipes: the scheme of each tensor of a decoder.

A name reads left to right: `8da4w-g32-e4` is 8-bit dynamic activations, 4-bit body weights in
groups of 32 inputs, a 4-bit embedding. The head is 8-bit per output channel in every recipe: it
costs a few per cent of the size, and its errors go straight into the logits. With `d8` the
feed-forward layers' `down` is 8-bit, too, which costs the body a fifth of its size: nothing else
loses as much in 4 bits (see `cloister.quantize.calibrate`). `8da8w` has 8-bit weights per channel
throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister.errors import SettingError

__all__ = ["DEFAULT_RECIPE", "RECIPES", "Recipe", "Scheme"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The layout of one matrix: `bits` an entry, one scale for each `group` inputs or each row.

    Raises:
        SettingError: bits other than 4 and 8, or groups for 8 bits.
    """

    bits: int
    group: int | None  # inputs a scale; None: the whole row

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise SettingError(f"Weights of {self.bits} bits are not supported; use 4 or 8.")
        # XNNPACK has kernels for groups of 4-bit weights, in multiples of 32, and for nothing else.
        if (self.bits == 4) != (self.group is not None):
            raise SettingError("4-bit weights are held in groups and 8-bit weights in rows.")
        if self.group is not None and (self.group < 32 or self.group % 32):
            raise SettingError(f"A group of {self.group} is not supported; use a multiple of 32.")

    @property
    def scale_bits(self) -> int:
        """Bits of one scale: bfloat16 for groups (XNNPACK truncates wider ones), else float32."""
        return 32 if self.group is None else 16

    def groups(self, inputs: int) -> int:
        """Return the number of scales in a row of `inputs`."""
        return 1 if self.group is None else inputs // self.group

    def size_bytes(self, rows: int, inputs: int) -> int:
        """Return the bytes of a matrix of `rows` x `inputs`, scales included."""
        return rows * (inputs * self.bits + self.groups(inputs) * self.scale_bits) // 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named choice of schemes."""

    name: str
    body: Scheme
    down: Scheme  # of the feed-forward layers
    head: Scheme
    embedding: Scheme

    def scheme_of(self, tensor: str) -> Scheme | None:
        """Return the scheme of the tensor called `tensor`, or None where it stays in float32."""
        if tensor == "embed.weight":
            return self.embedding
        if tensor == "head.weight":
            return self.head
        if tensor.endswith("mlp.down.weight"):
            return self.down
        if tensor.endswith(".weight") and "norm" not in tensor:
            return self.body
        return None  # norms and biases

    @classmethod
    def parse(cls, name: str) -> Recipe:
        """Return the recipe called `name`.

        Raises:
            SettingError: no recipe of that name.
        """
        if name not in RECIPES:
            raise SettingError(f"No recipe is named {name!r}; choose one of {', '.join(RECIPES)}.")
        row = Scheme(bits=8, group=None)
        kind, *variants = name.split("-")
        if kind == "8da8w":
            return cls(name=name, body=row, down=row, head=row, embedding=row)
        group, *wide = variants
        body = Scheme(bits=4, group=int(group.removeprefix("g")))
        return cls(
            name=name, body=body, down=row if "d8" in wide else body, head=row,
            embedding=Scheme(bits=4, group=32) if "e4" in wide else row)


RECIPES = (
    "8da4w-g32", "8da4w-g32-e4", "8da4w-g32-d8", "8da4w-g64", "8da4w-g64-e4", "8da4w-g128",
    "8da4w-g128-e4", "8da8w",
)
DEFAULT_RECIPE = "8da4w-g32"
