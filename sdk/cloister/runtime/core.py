"""The decode core: a loaded program, and the positions that its KV buffers hold.

Shapes: N new positions, T positions of one call, V vocabulary, G KV heads, D head size.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from cloister.errors import ContextExceeded, EmptyPrompt, EngineBusy, UnsupportedMedia

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.runtime.program import Program

__all__ = ["DIGEST_BYTES", "MEDIA", "Core", "MediaPosition", "Position", "Rows", "encoded"]

MEDIA = 2**32 - 1  # stands in a name where a token's id would: no vocabulary is as large
DIGEST_BYTES = 32


class Rows(StrEnum):
    """Which positions `Core.extend` gives logits for."""

    LAST = "last"
    ALL = "all"  # of those that were not held yet


@dataclass(frozen=True)
class MediaPosition:
    """One vector of a picture or a recording; two are equal where digest and place are."""

    digest: bytes  # keyed digest of the decoded media, DIGEST_BYTES long
    place: int  # number of the vector in it
    vector: torch.Tensor | None = field(default=None, compare=False, repr=False)  # float32[hidden]


Position = int | MediaPosition
"""A token id, or one vector of a picture or a recording."""


def encoded(position: Position) -> bytes:
    """Name a position in bytes; no name is the beginning of another.

    A token's is its id in 4 bytes; a vector's is MEDIA, its place in 4 bytes, and the digest.
    """
    if isinstance(position, int):
        return position.to_bytes(4, "big")
    return MEDIA.to_bytes(4, "big") + position.place.to_bytes(4, "big") + position.digest


class Core:
    """A program and its KV buffers.

    One thread at a time, and one unfinished stream at a time: the second is refused by name.
    """

    def __init__(self, program: Program, *, name: str, context: int, chunk: int) -> None:
        """Take `program`, for `context` positions, read at most `chunk` at a time."""
        self.program, self.name, self.context, self.chunk = program, name, context, chunk
        self._cached: list[Position] = []
        self._lock = threading.RLock()  # of the thread that is using it
        self._thread: int | None = None
        self._owner: object | None = None  # of the unfinished stream

    @property
    def cached(self) -> list[Position]:
        """The positions whose keys and values the buffers hold."""
        return list(self._cached)

    def common(self, positions: Sequence[Position]) -> int:
        """Count the positions, from the front, that the buffers hold already."""
        most = min(len(self._cached), len(positions))
        if self._cached[:most] == list(positions[:most]):
            return most
        pairs = zip(self._cached, positions, strict=False)
        return next(number for number, (old, new) in enumerate(pairs) if old != new)

    def extend(self, positions: Sequence[Position], rows: Rows = Rows.LAST) -> torch.Tensor:
        """Read those of `positions` that the buffers do not hold, from the front, yet.

        Buffers that hold something else forget it. Logits after the last position, float32[1, V],
        or after each that was read now, float32[N, V]; the last one is read again where all are
        held. They are overwritten by the next call.

        Raises:
            EmptyPrompt: no positions.
            ContextExceeded: more positions than the context holds; nothing has changed.
            UnsupportedMedia: a vector of a picture or recording, which the program cannot read.
            EngineBusy: another thread is using the engine.
        """
        if not positions:
            raise EmptyPrompt("There are no tokens to read; give at least one.")
        self._check(len(positions))
        with self.exclusive():
            start = min(self.common(positions), len(positions) - 1)
            del self._cached[start:]
            parts = []
            for at in range(start, len(positions), self.chunk):
                part = positions[at:at + self.chunk]
                parts.append(self._read(part, at, rows))
                self._cached += part
        return parts[-1] if rows is Rows.LAST or len(parts) == 1 else torch.cat(parts)

    def truncate(self, length: int) -> None:
        """Forget the positions from number `length` on.

        Raises:
            EngineBusy: another thread is using the engine.
        """
        with self.exclusive():
            del self._cached[length:]

    def buffers(self, start: int, stop: int) -> list[torch.Tensor]:
        """Live views of the keys and values of positions, float32[T, G, D] each, in one order."""
        found = self.program.kv_buffers()
        return [found[name][0, start:stop] for name in sorted(found)]

    def mark_cached(self, positions: Sequence[Position]) -> None:
        """Say which positions' keys and values were written through `buffers`, from the front.

        Raises:
            ContextExceeded: more positions than the context holds.
        """
        self._check(len(positions))
        self._cached = list(positions)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads out while the block reads or writes `buffers`.

        Raises:
            EngineBusy: another thread is using the engine.
        """
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            raise EngineBusy(
                f"Bundle {self.name} is being used by another thread; use one engine for each, or "
                "take turns."
            )
        with self._lock:  # entered and left whole, whatever an interrupt does
            before, self._thread = self._thread, thread
            try:
                yield
            finally:
                self._thread = before

    def claim(self, owner: object) -> bool:
        """Give the engine to the stream of `owner` until it is released; False where it has it.

        Raises:
            EngineBusy: another unfinished stream has it, or another thread is using the engine.
        """
        with self.exclusive():
            if self._owner is not None and self._owner is not owner:
                raise EngineBusy(
                    f"Bundle {self.name} is giving another answer; read, stop or close that one "
                    "first, or load the bundle once more."
                )
            new, self._owner = self._owner is None, owner
        return new

    def release(self, owner: object) -> None:
        """Take the engine back from the stream of `owner`, where it has it."""
        if self._owner is owner:
            self._owner = None

    def _read(self, part: Sequence[Position], start: int, rows: Rows) -> torch.Tensor:
        if not all(isinstance(position, int) for position in part):
            raise UnsupportedMedia(
                f"Bundle {self.name} reads text only; name one that reads pictures or sound."
            )
        tokens = torch.tensor([list(part)])
        if rows is Rows.LAST:
            return self.program.forward(tokens, start)
        return self.program.score(tokens, start)[0].clone()  # the next call overwrites it

    def _check(self, length: int) -> None:
        if length > self.context:
            raise ContextExceeded(
                f"The text has {length} tokens and the context holds {self.context}; shorten it."
            )
