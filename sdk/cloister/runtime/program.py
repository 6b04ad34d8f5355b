"""What an engine needs of a loaded program, and a fake of it for tests.

Shapes: T new tokens, V vocabulary, C context, G KV heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from cloister.runtime._executorch import load, runs_here

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FakeProgram", "Program", "load", "runs_here"]


class Program(Protocol):
    """A loaded program; its calls share one set of KV buffers."""

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after the last token, int64[1, T] -> float32[1, V]."""
        ...

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after every token, int64[1, T] -> float32[1, T, V]."""
        ...

    def kv_buffers(self) -> Mapping[str, torch.Tensor]:
        """Live views of the KV buffers by name, float32[1, C, G, D] each."""
        ...


class FakeProgram:
    """Cheap, deterministic, and as sensitive to a wrong KV row as a real program.

    Its one buffer holds the ids read so far; the logits are a random function of them all.
    """

    def __init__(self, vocab_size: int, context: int, prefer: tuple[int, ...] = ()) -> None:
        self.vocab_size, self.prefer = vocab_size, prefer
        self.calls: list[tuple[int, int]] = []  # start and number of tokens of each call
        self._buffer = torch.zeros(1, context, 1, 1)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """See `Program.forward`."""
        return self.score(tokens, start)[:, -1]

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """See `Program.score`."""
        length = tokens.shape[1]
        self.calls.append((start, length))
        self._buffer[0, start:start + length, 0, 0] = tokens[0].float()
        return torch.stack([self._row(start + i + 1) for i in range(length)])[None]

    def kv_buffers(self) -> Mapping[str, torch.Tensor]:
        """See `Program.kv_buffers`."""
        return {"layers.0.attn.k_cache": self._buffer}

    def _row(self, end: int) -> torch.Tensor:
        ids = self._buffer[0, :end, 0, 0].long()
        seed = 0
        for id_ in ids.tolist():
            seed = (seed * 1_000_003 + id_ + 1) % 2**61
        row = torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed))
        if self.prefer:  # plain text, where a test wants to read it
            row[self.prefer[end % len(self.prefer)]] += 20
        return row
