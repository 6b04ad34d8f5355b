"""A sense: what makes vectors that a decoder reads of pictures, or of recordings.

    pixels or samples -> front -> encoder -> projector -> vectors

Shapes: B batch, C channels, R rows, W columns, N samples, M vectors, E their size, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from cloister.errors import SettingError
from cloister.model.encoder import Encoder, EncoderShape
from cloister.model.front import Mel, MelShape, Pixels, PixelScale
from cloister.model.projector import ProjectorShape, projector
from cloister.model.quantized import QuantizedLinear
from cloister.model.recipe import Recipe, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Sense", "SenseConfig", "linears", "scheme_of"]


@dataclass(frozen=True, kw_only=True)
class SenseConfig:
    """Everything but the weights that decides what a sense computes.

    Raises:
        SettingError: not one front, or parts that do not fit one another.
    """

    encoder: EncoderShape
    projector: ProjectorShape | None = None  # None: the encoder's own vectors
    pixels: PixelScale | None = None  # of pictures
    mel: MelShape | None = None  # of recordings
    # Recordings are whole numbers of the encoder's longest input, each encoded by itself (Voxtral).
    pieces: bool = False
    recipe: str | None = None  # of the linear layers' weights

    def __post_init__(self) -> None:
        if (self.pixels is None) == (self.mel is None):
            raise SettingError("A sense has either pixels or a mel spectrum before its encoder.")
        if self.projector is not None:
            self.projector.check(self.encoder)
        if self.recipe is not None:
            Recipe.parse(self.recipe)
        wanted, given = self.encoder.channels, 1 if self.pixels is None else self.pixels.channels
        if given != wanted:
            raise SettingError(f"The encoder reads {wanted} channels, and is given {given}.")
        if self.mel is not None and self.mel.bins != self.encoder.rows:
            raise SettingError(
                f"The encoder reads {self.encoder.rows} bins, and is given {self.mel.bins}.")
        if self.pieces and self.mel is None:
            raise SettingError("Only recordings are cut into pieces.")

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return self.encoder.hidden_size if self.projector is None else self.projector.size

    @property
    def vectors(self) -> int:
        """Number of vectors of a picture, or of the encoder's longest recording."""
        return self.encoder.positions // self._merged

    @property
    def samples_per_vector(self) -> int:
        """Samples of a recording that become one vector."""
        assert self.mel is not None
        return self.mel.hop * self.encoder.stride * self._merged

    @property
    def _merged(self) -> int:
        return 1 if self.projector is None else self.projector.merged


class Sense(nn.Module):
    """Pictures uint8[B, 3, R, W], or a recording float32[1, 1, N], to float32[B, M, E].

    Pictures have the rows and columns of the encoder's shape. A recording has any multiple of
    `samples_per_vector` up to the encoder's longest, or of that one where it is cut into pieces.
    """

    def __init__(self, config: SenseConfig) -> None:
        super().__init__()
        self.config = config
        self.front: Pixels | Mel
        if config.pixels is not None:
            self.front = Pixels(config.pixels)
        else:
            assert config.mel is not None
            self.front = Mel(config.mel)
        self.encoder = Encoder(config.encoder)
        self.projector = (
            nn.Identity() if config.projector is None
            else projector(config.projector, config.encoder))
        if config.recipe is not None:
            recipe = Recipe.parse(config.recipe)
            for name, linear in list(linears(self)):
                rows, inputs = linear.weight.shape
                scheme = scheme_of(recipe, name, inputs)
                with torch.device(linear.weight.device):
                    self.set_submodule(name, QuantizedLinear(
                        inputs, rows, scheme, bias=linear.bias is not None))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the vectors, float32[B, M, E]."""
        out_BME: torch.Tensor = self.projector(self.encoder(self.read(x)))
        return out_BME.flatten(0, 1).unsqueeze(0) if self.config.pieces else out_BME

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the encoder reads, float32[B, C, R, W], of a recording each piece."""
        x_BCRW: torch.Tensor = self.front(x)
        if self.config.pieces:
            x_1CRPW = x_BCRW.unflatten(3, (-1, self.config.encoder.columns))
            x_BCRW = x_1CRPW.squeeze(0).permute(2, 0, 1, 3)
        return x_BCRW


def linears(part: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that a recipe quantizes, by name; convolutions stay in float32."""
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def scheme_of(recipe: Recipe, name: str, inputs: int) -> Scheme:
    """Return the scheme of the linear layer `name`, in rows of 8 bits where no group divides.

    SigLIP's feed-forward layers have 4304 inputs, for which no backend has 4-bit kernels. What
    chooses among tokens is held as a decoder's head is.
    """
    scheme = recipe.head if name == "projector.head" else recipe.scheme_of(f"{name}.weight")
    assert scheme is not None
    if scheme.group is not None and inputs % scheme.group:
        return Scheme(bits=8, group=None)
    return scheme
