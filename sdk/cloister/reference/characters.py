"""An encoder of pictures with characters on top: connectionist temporal classification.

Shapes: B batch, R rows, W columns, P positions, S symbols.

Source: Graves et al., "Connectionist temporal classification", ICML 2006. The characters serve to
train the encoder and to measure it; a tier reads the encoder's vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cloister.errors import TrainingError
from cloister.files import whole_file
from cloister.model import sense_file
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import PixelScale
from cloister.model.sense import Sense, SenseConfig
from cloister.reference import ctc
from cloister.reference.drawing import HEIGHT, WIDTH
from cloister.reference.lines import ALPHABET

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CharacterModel", "decode", "default", "encode", "load", "write"]

_SYMBOLS = {character: number for number, character in enumerate(ALPHABET, 1)}  # 0 is the blank
_HEAD = "characters.safetensors"
_STRIDE = 4  # columns of a position


def default() -> SenseConfig:
    """Return the reference family's encoder of lines: 128 positions of 4 columns, 0.8 M weights.

    White is 0, so that a picture that is filled up has nothing there.
    """
    return SenseConfig(
        encoder=EncoderShape(
            stem=Stem.CONVOLUTIONS_2D, rows=HEIGHT, positions=WIDTH // _STRIDE, hidden_size=128,
            layers=4, heads=4, feed_forward=256, halvings=2, width=32, kernel=7),
        pixels=PixelScale(mean=(1.0,), deviation=(0.5,)))


class CharacterModel(nn.Module):
    """A sense without a projector, and a layer of characters."""

    def __init__(self, config: SenseConfig, seed: int = 0) -> None:
        super().__init__()
        self.sense = Sense(config)
        self.sense.encoder.initialize(seed)
        self.characters = nn.Linear(config.encoder.hidden_size, 1 + len(ALPHABET))
        with torch.no_grad():
            rng = torch.Generator().manual_seed(seed)
            self.characters.weight.normal_(std=0.02, generator=rng)
            self.characters.bias.zero_()

    def forward(self, x_BRW: torch.Tensor) -> torch.Tensor:
        """Map grey pictures, uint8[B, R, W], to log-probabilities of symbols, float32[B, P, S].

        Products are in bfloat16 where the processor has them. Attention is computed without
        fused kernels: the backward pass of torch's (2.13, on processors) takes half of a step.
        """
        x_B3RW = x_BRW.unsqueeze(1).expand(-1, 3, -1, -1)
        fast = x_BRW.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast), sdpa_kernel(SDPBackend.MATH):
            y_BPS: torch.Tensor = self.characters(self.sense(x_B3RW))
        return y_BPS.float().log_softmax(-1)

    def loss(self, x_BRW: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Return nats a character of the texts, one of each picture."""
        return ctc.loss(self(x_BRW), [encode(text) for text in texts])

    def read(self, x_BRW: torch.Tensor) -> list[str]:
        """Return the text of each picture."""
        with torch.inference_mode():
            return [decode(log_p_PS) for log_p_PS in self(x_BRW)]


def encode(text: str) -> torch.Tensor:
    """Return the symbols of a text of `ALPHABET`, int64[N]."""
    return torch.tensor([_SYMBOLS[character] for character in text])


def decode(log_p_PS: torch.Tensor) -> str:
    """Return the text of the best symbol at each position."""
    return ctc.decode(log_p_PS, ALPHABET)


def write(model: CharacterModel, folder: Path) -> None:
    """Write `vision.safetensors`, a sense without a projector, and the characters beside it.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`.
    """
    sense_file.save(folder / sense_file.SenseKind.VISION.file, model.sense)
    with whole_file(folder / _HEAD) as file:
        file.write(save(model.characters.state_dict()))


def load(folder: Path) -> CharacterModel:
    """Read what `write` wrote; it is the same model.

    Raises:
        CheckpointError: the sense cannot be read.
        TrainingError: the characters cannot be read.
    """
    sense = sense_file.SenseFile.open(folder / sense_file.SenseKind.VISION.file).load()
    model = CharacterModel(sense.config)
    model.sense = sense
    try:
        model.characters.load_state_dict(load_file(folder / _HEAD))
    except (OSError, SafetensorError, RuntimeError):
        raise TrainingError(
            f"{_HEAD} of {folder.name} cannot be read; train the encoder again.") from None
    return model.eval()
