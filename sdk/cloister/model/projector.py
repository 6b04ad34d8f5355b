"""The projector: what turns an encoder's vectors into those that a decoder reads.

Shapes: B batch, N positions of the encoder, M of the projector, D encoder's hidden size, E
decoder's hidden size, F factor, S positions of a square grid's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.errors import SettingError
from cloister.model.transformer import RMSNorm

if TYPE_CHECKING:
    from cloister.model.encoder import EncoderShape

__all__ = ["Projector", "ProjectorKind", "ProjectorShape", "projector"]


class ProjectorKind(StrEnum):
    """The layouts of projectors."""

    POOL = "pool"  # means of F x F positions, a norm, a matrix (Gemma 3)
    SHUFFLE = "shuffle"  # F x F positions side by side, a matrix (Idefics 3, SmolVLM)
    STACK = "stack"  # F positions side by side, two matrices (Voxtral)
    NORM_LINEAR = "norm_linear"  # F positions side by side, a norm, a linear layer (our own)
    LINEAR = "linear"  # F positions side by side, a linear layer


_SQUARE = (ProjectorKind.POOL, ProjectorKind.SHUFFLE)


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """Dimensions of a projector.

    Raises:
        SettingError: a dimension is out of bounds.
    """

    kind: ProjectorKind
    size: int  # the decoder's hidden size
    factor: int = 1  # positions that become one, or the side of a square of them

    def __post_init__(self) -> None:
        for name in ("size", "factor"):
            if not 1 <= getattr(self, name) <= 2**24:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be from 1 to 2**24.")

    @property
    def merged(self) -> int:
        """Number of the encoder's positions that become one."""
        return self.factor**2 if self.kind in _SQUARE else self.factor

    def check(self, encoder: EncoderShape) -> None:
        """Raise SettingError unless an encoder's longest input divides into whole vectors."""
        side = encoder.grid_rows
        if self.kind in _SQUARE and (side * side != encoder.positions or side % self.factor):
            raise SettingError(
                f"A projector that makes one of {self.factor} x {self.factor} positions needs a "
                f"square that these divide, and the encoder has {side} rows and "
                f"{encoder.positions} positions.")
        if encoder.positions % self.merged:
            raise SettingError(
                f"{encoder.positions} positions cannot be made one of each {self.merged}.")


class Projector(nn.Module):
    """Base of the layouts: float[B, N, D] -> [B, M, E], where M = N / `shape.merged`."""

    def __init__(self, shape: ProjectorShape, encoder: EncoderShape) -> None:
        super().__init__()
        self.shape, self.side = shape, encoder.grid_rows
        self.inputs = shape.merged * encoder.hidden_size  # of the positions side by side

    def side_by_side(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Map [B, N, D] -> [B, M, F * D]."""
        out_BMX: torch.Tensor = x_BND.unflatten(1, (-1, self.shape.factor)).flatten(2)
        return out_BMX


class _Pool(Projector):
    def __init__(self, shape: ProjectorShape, encoder: EncoderShape) -> None:
        super().__init__(shape, encoder)
        self.norm = RMSNorm(encoder.hidden_size, eps=encoder.norm_eps, offset=True)
        self.linear = nn.Linear(encoder.hidden_size, shape.size, bias=False)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        x_BDSS = x_BND.transpose(1, 2).unflatten(2, (self.side, self.side))
        x_BDM = functional.avg_pool2d(x_BDSS, self.shape.factor).flatten(2)
        out_BME: torch.Tensor = self.linear(self.norm(x_BDM.transpose(1, 2)))
        return out_BME


class _Shuffle(Projector):
    def __init__(self, shape: ProjectorShape, encoder: EncoderShape) -> None:
        super().__init__(shape, encoder)
        self.linear = nn.Linear(self.inputs, shape.size, bias=False)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        factor = self.shape.factor
        # Rows and columns of squares, then rows and columns within one.
        x_BSFSFD = x_BND.unflatten(1, (self.side // factor, factor, self.side // factor, factor))
        x_BMX = x_BSFSFD.transpose(2, 3).flatten(3).flatten(1, 2)
        out_BME: torch.Tensor = self.linear(x_BMX)
        return out_BME


class _Stack(Projector):
    def __init__(self, shape: ProjectorShape, encoder: EncoderShape) -> None:
        super().__init__(shape, encoder)
        self.up = nn.Linear(self.inputs, shape.size, bias=False)
        self.down = nn.Linear(shape.size, shape.size, bias=False)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        out_BME: torch.Tensor = self.down(functional.gelu(self.up(self.side_by_side(x_BND))))
        return out_BME


class _Linear(Projector):
    def __init__(self, shape: ProjectorShape, encoder: EncoderShape) -> None:
        super().__init__(shape, encoder)
        normed = shape.kind is ProjectorKind.NORM_LINEAR
        self.norm = nn.LayerNorm(self.inputs) if normed else nn.Identity()
        self.linear = nn.Linear(self.inputs, shape.size)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        out_BME: torch.Tensor = self.linear(self.norm(self.side_by_side(x_BND)))
        return out_BME


_KINDS: dict[ProjectorKind, type[Projector]] = {
    ProjectorKind.POOL: _Pool, ProjectorKind.SHUFFLE: _Shuffle, ProjectorKind.STACK: _Stack,
    ProjectorKind.NORM_LINEAR: _Linear, ProjectorKind.LINEAR: _Linear,
}


def projector(shape: ProjectorShape, encoder: EncoderShape) -> Projector:
    """Return a projector of `shape` for the vectors of `encoder`, with torch's own initial weights.

    Raises:
        SettingError: see `ProjectorShape.check`.
    """
    shape.check(encoder)
    return _KINDS[shape.kind](shape, encoder)
