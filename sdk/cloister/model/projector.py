"""The projector: what turns an encoder's vectors into those that a decoder reads.

Shapes: B batch, N positions of the encoder, M of the projector, D encoder's hidden size, E
decoder's hidden size, F factor, S positions of a square grid's side, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.errors import SettingError
from cloister.model.spelling import Spelling, begins
from cloister.model.transformer import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.encoder import EncoderShape

__all__ = ["Projector", "ProjectorKind", "ProjectorShape", "TokenProjector", "projector"]


class ProjectorKind(StrEnum):
    """The layouts of projectors."""

    POOL = "pool"  # means of F x F positions, a norm, a matrix (Gemma 3)
    SHUFFLE = "shuffle"  # F x F positions side by side, a matrix (Idefics 3, SmolVLM)
    STACK = "stack"  # F positions side by side, two matrices (Voxtral)
    TOKENS = "tokens"  # the tokens that are seen or heard (our own)


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
    vocabulary: int = 0  # of the decoder, for `TOKENS` alone
    alphabet: str = ""  # of `TOKENS` that are found by their characters

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("factor", 1), ("vocabulary", 0)):
            if not least <= getattr(self, name) <= 2**24:
                raise SettingError(
                    f"{name} is {getattr(self, name)}; it must be from {least} to 2**24.")
        tokens = self.kind is ProjectorKind.TOKENS
        if tokens != (self.vocabulary > 0) or (tokens and self.factor > 1):
            raise SettingError("A projector to tokens has a vocabulary and no factor, others none.")
        if len(set(self.alphabet)) < len(self.alphabet) or (self.alphabet and not tokens):
            raise SettingError(
                "An alphabet has each character once and belongs to a projector to tokens.")

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


class TokenProjector(Projector):
    """The decoder's embeddings of the tokens that the encoder sees or hears, and a correction.

    Each position is the likeliest of the tokens and of none, as connectionist temporal
    classification has it (Graves et al., ICML 2006), or with an alphabet the likeliest of its
    characters, whose tokens `Spelling` knows. So a decoder reads as many vectors as it would read
    tokens. The correction, of the encoder's own vector, is what else there is to know. Where no
    token is found the correction alone stands for it, at the last position.
    """

    def __init__(self, shape: ProjectorShape, encoder: EncoderShape) -> None:
        super().__init__(shape, encoder)
        if shape.alphabet:
            self.spelling = Spelling(shape.alphabet, encoder.hidden_size, shape.vocabulary)
        else:
            self.norm = nn.LayerNorm(encoder.hidden_size)
            self.head = nn.Linear(encoder.hidden_size, shape.vocabulary + 1)  # none is the last
        self.correction = nn.Linear(encoder.hidden_size, shape.size, bias=False)
        nn.init.zeros_(self.correction.weight)
        self._embed: list[Callable[[torch.Tensor], torch.Tensor]] = []  # no module of this one's

    def read_with(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take the decoder's embedding, int64[M] -> float32[M, E], its scale included."""
        self._embed = [embed]

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Map [1, N, D] -> [1, M, E], M from 1 to N."""
        x_BND, tokens_BN = self.found(x_BND)
        x_ND, tokens_N = x_BND.squeeze(0), tokens_BN.squeeze(0)
        # Not `[:, 0]`: of the column that nonzero gives ExecuTorch 1.4.1 reads the whole alone.
        at_M = torch.nonzero(self.kept(tokens_N)).reshape(-1)
        torch._check(at_M.shape[0] >= 1)
        torch._check(at_M.shape[0] <= x_ND.shape[0])
        return self.vectors(x_ND.index_select(0, at_M), tokens_N.index_select(0, at_M)).unsqueeze(0)

    def found(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the correction reads at N places, and the token of each, int64[B, N]."""
        if self.shape.alphabet:
            return self.spelling(x_BND)  # type: ignore[no-any-return]
        x_BND = self.norm(x_BND)
        best_BN = self.head(x_BND).argmax(-1)
        none = self.shape.vocabulary
        return x_BND, best_BN.masked_fill(~begins(best_BN, none), none)

    def kept(self, tokens_BN: torch.Tensor) -> torch.Tensor:
        """Return which places hold a token, bool[..., N], or the last where none does."""
        there_BN = tokens_BN != self.shape.vocabulary
        last_B1 = there_BN[..., -1:] | ~there_BN.any(-1, keepdim=True)
        return torch.cat((there_BN[..., :-1], last_B1), -1)

    def vectors(self, x_MD: torch.Tensor, tokens_M: torch.Tensor) -> torch.Tensor:
        """Return what a decoder reads for positions and their tokens, [M, E]."""
        (embed,) = self._embed
        there_M1 = (tokens_M < self.shape.vocabulary).unsqueeze(-1)
        known_ME = embed(tokens_M.clamp(max=self.shape.vocabulary - 1))
        out_ME: torch.Tensor = known_ME * there_M1 + self.correction(x_MD)
        return out_ME


_KINDS: dict[ProjectorKind, type[Projector]] = {
    ProjectorKind.POOL: _Pool, ProjectorKind.SHUFFLE: _Shuffle, ProjectorKind.STACK: _Stack,
    ProjectorKind.TOKENS: TokenProjector,
}


def projector(shape: ProjectorShape, encoder: EncoderShape) -> Projector:
    """Return a projector of `shape` for the vectors of `encoder`, with torch's own initial weights.

    Raises:
        SettingError: see `ProjectorShape.check`.
    """
    shape.check(encoder)
    return _KINDS[shape.kind](shape, encoder)
