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

if TYPE_CHECKING:
    from torch import nn

    from cloister.pieces import MediaFormats

__all__ = ["Media"]


@dataclass(frozen=True, kw_only=True)
class Media:
    """The encoders of a program, and what they take."""

    formats: MediaFormats
    vision: nn.Module | None = None
    audio: nn.Module | None = None

    @property
    def both_ways(self) -> bool:
        """Whether vectors of a picture attend to one another both ways."""
        return self.formats.picture is not None and self.formats.picture.both_ways

    def most(self, tokens: int) -> int:
        """Return the most vectors of a call, where `tokens` are those of `forward`."""
        if self.both_ways and self.formats.picture is not None:
            return max(tokens, self.formats.picture.tokens)
        return tokens
