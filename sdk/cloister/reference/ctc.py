"""An encoder of sound with letters on top: connectionist temporal classification.

Shapes: B batch, N samples, R mel bins, T frames, P positions, S symbols.

Source: Graves et al., "Connectionist temporal classification", ICML 2006. The letters serve to
train the encoder and to measure it; a tier reads the encoder's vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.errors import SettingError
from cloister.model.encoder import Encoder, EncoderShape, Stem
from cloister.model.front import Mel, MelShape

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LETTERS", "CtcConfig", "CtcModel", "decode", "encode", "loss"]

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
"""The symbols after the blank, which is number 0."""


def _encoder_shape() -> EncoderShape:
    return EncoderShape(
        stem=Stem.CONVOLUTIONS_2D, rows=80, positions=400, hidden_size=128, layers=4, heads=4,
        feed_forward=256, halvings=2, width=32, kernel=15)


@dataclass(frozen=True, kw_only=True)
class CtcConfig:
    """What a model hears with. By default 25 positions a second, and at most 16 seconds.

    Raises:
        SettingError: the encoder does not read the bins of the spectrum.
    """

    encoder: EncoderShape
    mel: MelShape

    def __post_init__(self) -> None:
        if self.mel.bins != self.encoder.rows:
            raise SettingError(
                f"The encoder reads {self.encoder.rows} bins, and is given {self.mel.bins}.")

    @classmethod
    def default(cls) -> CtcConfig:
        """Return the reference family's encoder."""
        shape = _encoder_shape()
        return cls(encoder=shape, mel=MelShape(bins=shape.rows))

    @property
    def stride(self) -> int:
        """Samples of a position."""
        return self.mel.hop * self.encoder.stride

    @property
    def longest(self) -> int:
        """Samples of the longest recording."""
        return self.encoder.positions * self.stride


class CtcModel(nn.Module):
    """Mel spectrum, encoder, and a layer of letters."""

    def __init__(self, config: CtcConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.mel = Mel(config.mel)
        self.encoder = Encoder(config.encoder)
        self.letters = nn.Linear(config.encoder.hidden_size, 1 + len(LETTERS))
        self.encoder.initialize(seed)
        with torch.no_grad():
            rng = torch.Generator().manual_seed(seed)
            self.letters.weight.normal_(std=0.02, generator=rng)
            self.letters.bias.zero_()

    def spectrum(self, x_BN: torch.Tensor) -> torch.Tensor:
        """Return the log-mel spectrum, float32[B, 1, R, T]; nothing in it is trained."""
        with torch.no_grad():
            out: torch.Tensor = self.mel(x_BN.unsqueeze(1))
        return out

    def forward(self, x_B1RT: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of symbols, float32[B, P, S]."""
        out: torch.Tensor = self.letters(self.encoder(x_B1RT)).log_softmax(-1)
        return out

    def loss(self, x_B1RT: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Return nats a symbol of the texts, one for each recording."""
        return loss(self(x_B1RT), [encode(text) for text in texts])


def loss(log_p_BPS: torch.Tensor, coded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return nats a symbol of texts as int64[N] each; symbol 0 is the blank."""
    lengths = torch.tensor([len(each) for each in coded])
    positions = torch.full((len(coded),), log_p_BPS.shape[1])
    total = functional.ctc_loss(
        log_p_BPS.transpose(0, 1), torch.cat(list(coded)), positions, lengths, reduction="sum",
        zero_infinity=True)
    return total / lengths.sum()


def encode(text: str) -> torch.Tensor:
    """Return the symbols of a text of `LETTERS`, int64[N]."""
    return torch.tensor([1 + LETTERS.index(letter) for letter in text])


def decode(log_p_PS: torch.Tensor, symbols: str = LETTERS) -> str:
    """Return the text of the best symbol at each position; `symbols` are those after the blank."""
    best = [symbol for symbol, _ in groupby(log_p_PS.argmax(-1).tolist())]
    return " ".join("".join(symbols[symbol - 1] for symbol in best if symbol).split())
