"""What a program has for pictures and recordings, beside the methods that read text.

    token_embedding   int64[1, T] -> float32[1, T, E]
    text_decoder      float32[1, T, E], int64[1] -> float32[1, V], after the last vector
    vision_encoder    uint8[1, 3, height, width] -> float32[1, N, E]
    audio_encoder     float32[1, 1, samples] -> float32[1, N, E]

The names are those of ExecuTorch's MultimodalRunner (extension/llm/runner/constants.h in 1.4),
which runs such a program as it is. E is the decoder's hidden size. Where vectors of a picture
attend to one another both ways it is one more, which is 1 for these and 0 for all else, and all the
vectors of a call are those of one picture, or none is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cloister.errors import ExportError
from cloister.model.quantized import QuantizedLinear

if TYPE_CHECKING:
    from cloister.model.sense import Sense
    from cloister.pieces import MediaFormats

__all__ = ["AUDIO", "VISION", "Media", "weight_bytes"]

VISION, AUDIO = "vision_encoder", "audio_encoder"


@dataclass(frozen=True, kw_only=True)
class Media:
    """The encoders of a program, and what they take."""

    formats: MediaFormats
    vision: Sense | None = None
    audio: Sense | None = None
    most: int = 0  # vectors, or tokens, in one call of `text_decoder` and `token_embedding`

    @property
    def senses(self) -> dict[str, Sense]:
        """The encoders by the names of their methods."""
        both = {VISION: self.vision, AUDIO: self.audio}
        return {method: sense for method, sense in both.items() if sense is not None}

    def check(self, context: int) -> None:
        """Raise ExportError unless the context holds one picture, or the shortest recording."""
        picture, recording = self.formats.picture, self.formats.recording
        least = max(
            0 if picture is None else picture.tokens,
            0 if recording is None else recording.multiple // recording.samples_per_token)
        if least >= context:
            raise ExportError(
                f"A picture or recording takes {least} tokens and the context holds {context}; "
                "export with a longer one.")

    def mark(self, method: str) -> float | None:
        """Return what an encoder appends to its vectors, if anything."""
        return float(method == VISION) if self.both_ways else None

    def longest(self, method: str) -> tuple[torch.Tensor, int]:
        """Return the longest input of an encoder, and what the length of a shorter one divides by.

        0 where it has one size.
        """
        if method == VISION:
            picture = self.formats.picture
            assert picture is not None
            return torch.zeros(1, 3, picture.height, picture.width, dtype=torch.uint8), 0
        recording = self.formats.recording
        assert recording is not None
        whole = recording.most // recording.multiple * recording.multiple
        return torch.zeros(1, 1, whole), recording.multiple

    @property
    def both_ways(self) -> bool:
        """Whether vectors of a picture attend to one another both ways."""
        return self.formats.picture is not None and self.formats.picture.both_ways

    @property
    def whole(self) -> int:
        """Vectors that are read in one call."""
        return self.formats.picture.tokens if self.both_ways and self.formats.picture else 1

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of all methods."""
        return "token_embedding", "text_decoder", *self.senses


def weight_bytes(sense: Sense) -> int:
    """Return the bytes that a program holds for `sense`."""
    total = 0
    for module in sense.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        total += sum(tensor.numel() * tensor.element_size() for tensor in own)
        if isinstance(module, QuantizedLinear) and module.scheme.bits == 4:  # two in a byte
            total -= module.weight.q.numel() // 2
    return total
