"""What an engine needs of a loaded program, and a fake of it for tests.

Shapes: T new tokens, V vocabulary, C context, G KV heads, D head size, N vectors of a picture or a
recording, E their size.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Protocol

import torch

from cloister.runtime._executorch import (
    Operators,
    load,
    operators_built,
    own_operators,
    runs_here,
    timed_operators,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cloister.pieces import MediaFormats

__all__ = ["FakeProgram", "Operators", "Program", "load", "operators_built", "own_operators",
           "runs_here", "timed_operators"]


class Program(Protocol):
    """A loaded program; its calls share one set of KV buffers."""

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after the last token, int64[1, T] -> float32[1, V]."""
        ...

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after every token, int64[1, T] -> float32[1, T, V]."""
        ...

    def decode(self, vectors: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after the last vector, float32[1, T, E] -> float32[1, V].

        All are of one picture where they attend to one another both ways.
        """
        ...

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors of a picture, uint8[1, 3, height, width] -> float32[1, N, E]."""
        ...

    def hear(self, samples: torch.Tensor) -> torch.Tensor:
        """Vectors of a recording, float32[1, 1, samples] -> float32[1, N, E]."""
        ...

    def kv_buffers(self) -> Mapping[str, torch.Tensor]:
        """Live views of the KV buffers by name, [1, C, G, D] each.

        They are of float32 or float16, or of int8 with the 4 bytes of a head's scale behind it.
        """
        ...


class FakeProgram:
    """Cheap, deterministic, and as sensitive to a wrong KV row as a real program.

    Its one buffer holds the ids read so far, and numbers for vectors; the logits are a random
    function of them all. Vectors of a picture that attend to one another both ways are read as
    what all those of the call are, so that a picture in two calls is another one.
    """

    def __init__(
        self, vocab_size: int, context: int, prefer: tuple[int, ...] = (),
        media: MediaFormats | None = None,
    ) -> None:
        self.vocab_size, self.prefer, self.media = vocab_size, prefer, media
        self.calls: list[tuple[int, int]] = []  # start and number of positions of each call
        self.encoded: list[str] = []  # what was seen and heard
        self._buffer = torch.zeros(1, context, 1, 1)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """See `Program.forward`."""
        return self.score(tokens, start)[:, -1]

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """See `Program.score`."""
        return self._read(tokens[0].float(), start)

    def decode(self, vectors: torch.Tensor, start: int) -> torch.Tensor:
        """See `Program.decode`."""
        numbers_T = vectors[0, :, 0]
        if vectors[0, 0, -1]:
            numbers_T = (numbers_T + numbers_T.sum() * torch.arange(1, 1 + len(numbers_T))) % 2**20
        return self._read(numbers_T + self.vocab_size, start)[:, -1]

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Program.see`."""
        assert self.media is not None
        assert self.media.picture is not None
        format_ = self.media.picture
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (1, 3, format_.height, format_.width)
        self.encoded.append("picture")
        count = 1 + int(pixels[0, 0, 0, 0]) % format_.tokens if format_.fewer else format_.tokens
        return self._encoded(pixels, count, both_ways=format_.both_ways)

    def hear(self, samples: torch.Tensor) -> torch.Tensor:
        """See `Program.hear`."""
        assert self.media is not None
        assert self.media.recording is not None
        format_, length = self.media.recording, samples.shape[2]
        assert samples.dtype == torch.float32
        assert length % format_.multiple == 0
        self.encoded.append("recording")
        return self._encoded(samples, length // format_.samples_per_token, both_ways=False)

    def kv_buffers(self) -> Mapping[str, torch.Tensor]:
        """See `Program.kv_buffers`."""
        return {"layers.0.attn.k_cache": self._buffer}

    def _encoded(self, data: torch.Tensor, count: int, *, both_ways: bool) -> torch.Tensor:
        """Return vectors of a number, and of whether they attend both ways, float32[1, N, 2]."""
        seed = zlib.crc32(data.numpy().tobytes())
        numbers = torch.randint(2**18, (count,), generator=torch.Generator().manual_seed(seed))
        return torch.stack((numbers.float(), torch.full((count,), float(both_ways))), dim=1)[None]

    def _read(self, numbers_T: torch.Tensor, start: int) -> torch.Tensor:
        length = len(numbers_T)
        self.calls.append((start, length))
        self._buffer[0, start:start + length, 0, 0] = numbers_T
        return torch.stack([self._row(start + i + 1) for i in range(length)])[None]

    def _row(self, end: int) -> torch.Tensor:
        ids = self._buffer[0, :end, 0, 0].long()
        seed = 0
        for id_ in ids.tolist():
            seed = (seed * 1_000_003 + id_ + 1) % 2**61
        row = torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed))
        if self.prefer:  # plain text, where a test wants to read it
            row[self.prefer[end % len(self.prefer)]] += 20
        return row
