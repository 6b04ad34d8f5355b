"""The decode core: a loaded program, and the positions that its KV buffers hold.

Shapes: N new positions, T positions of one call, V vocabulary, E size of a vector, G KV heads,
D head size.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import torch

from cloister.errors import ContextExceeded, EmptyPrompt, EngineBusy, UnsupportedMedia
from cloister.pieces import MEDIA

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.runtime.program import Program

__all__ = ["DIGEST_BYTES", "Core", "MediaPosition", "Position", "Rows", "Vectors",
           "encoded"]

DIGEST_BYTES = 32


class Rows(StrEnum):
    """Which positions `Core.extend` gives logits for."""

    LAST = "last"
    ALL = "all"  # of those that were not held yet


class Vectors(Protocol):
    """The vectors of a picture or recording: a tensor float32[N, E], or what makes it when asked.

    E is the hidden size, and one more where vectors of a picture attend to one another both ways
    (see `cloister.export.media`).
    """

    def __getitem__(self, places: slice, /) -> torch.Tensor:
        """Return some of them, float32[T, E]."""


@dataclass(frozen=True)
class MediaPosition:
    """One vector of a picture or a recording; two are equal where digest and place are."""

    digest: bytes  # keyed digest of the decoded media, DIGEST_BYTES long
    place: int  # number of the vector in it
    vectors: Vectors | None = field(default=None, compare=False, repr=False)  # all of the medium's
    together: int = field(default=1, compare=False)
    """Vectors that are read in one call, since they attend to one another both ways: this one's
    are those from the last multiple of it on."""

    @property
    def behind(self) -> int:
        """Number of the vector's fellows before it that are read in one call with it."""
        return self.place % self.together


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

    def __init__(
        self, program: Program, *, name: str, context: int, chunk: int, reads_media: bool = False
    ) -> None:
        """Take `program`, for `context` positions, read at most `chunk` at a time.

        With `reads_media` it reads vectors of pictures or recordings, too.
        """
        self.program, self.name, self.context, self.chunk = program, name, context, chunk
        self.reads_media = reads_media
        self._cached: list[Position] = []
        self._lock = threading.RLock()  # of the thread that is using it
        self._thread: int | None = None
        self._owner: object | None = None  # of the unfinished stream

    @property
    def cached(self) -> list[Position]:
        """The positions whose keys and values the buffers hold."""
        return list(self._cached)

    def common(self, positions: Sequence[Position]) -> int:
        """Count the positions, from the front, that the buffers hold already.

        Those of a picture that is read in one call count once all of them are held.
        """
        most = min(len(self._cached), len(positions))
        if self._cached[:most] != list(positions[:most]):
            pairs = zip(self._cached, positions, strict=False)
            most = next(number for number, (old, new) in enumerate(pairs) if old != new)
        return _before(positions, most)

    def calls(self, positions: Sequence[Position]) -> list[int]:
        """Return the ends of the calls by which `extend` reads `positions`.

        A call has at most `chunk` of them, tokens or vectors; but vectors that attend to one
        another both ways are one call.
        """
        ends, at = list[int](), self._start(positions)
        while at < len(positions):
            at = self._end(positions, at)
            ends.append(at)
        return ends

    def extend(self, positions: Sequence[Position], rows: Rows = Rows.LAST) -> torch.Tensor:
        """Read those of `positions` that the buffers do not hold, from the front, yet.

        Buffers that hold something else forget it. Logits after the last position, float32[1, V],
        or after each that was read now, float32[N, V]; the last one is read again where all are
        held. They are overwritten by the next call.

        Raises:
            EmptyPrompt: no positions.
            ContextExceeded: more positions than the context holds; nothing has changed.
            UnsupportedMedia: a vector of a picture or recording, which the program cannot read, or
                not with logits after each.
            EngineBusy: another thread is using the engine.
        """
        if not positions:
            raise EmptyPrompt("There are no tokens to read; give at least one.")
        self._check(len(positions))
        with self.exclusive():
            start = self._start(positions)
            del self._cached[start:]
            parts = list[torch.Tensor]()
            for end in self.calls(positions):
                part = positions[start:end]
                if rows is Rows.ALL and parts:
                    parts[-1] = parts[-1].clone()  # this call overwrites it
                parts.append(self._read(part, start, rows))
                self._cached += part
                start = end
        return parts[-1] if rows is Rows.LAST or len(parts) == 1 else torch.cat(parts)

    def truncate(self, length: int) -> None:
        """Forget the positions from number `length` on.

        Raises:
            EngineBusy: another thread is using the engine.
        """
        with self.exclusive():
            del self._cached[length:]

    def buffers(self, start: int, stop: int) -> list[torch.Tensor]:
        """Live views of the keys and values of positions, [T, G, D] each, in one order."""
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

    def _start(self, positions: Sequence[Position]) -> int:
        """Number of the first position that `extend` reads: the last one in any case."""
        return _before(positions, max(0, min(self.common(positions), len(positions) - 1)))

    def _end(self, positions: Sequence[Position], start: int) -> int:
        """Where the call ends that begins at `start`."""
        first, most = positions[start], min(start + self.chunk, len(positions))
        if isinstance(first, MediaPosition) and first.together > 1:
            return min(start + first.together, len(positions))
        return next((at for at in range(start + 1, most) if _parted(first, positions[at])), most)

    def _read(self, part: Sequence[Position], start: int, rows: Rows) -> torch.Tensor:
        tokens = [position for position in part if isinstance(position, int)]
        if not tokens:
            return self._read_media(part, start, rows)
        if rows is Rows.LAST:
            return self.program.forward(torch.tensor([tokens]), start)
        return self.program.score(torch.tensor([tokens]), start)[0]

    def _read_media(self, part: Sequence[Position], start: int, rows: Rows) -> torch.Tensor:
        if not self.reads_media:
            raise UnsupportedMedia(
                f"Bundle {self.name} reads text only; name one that reads pictures or sound."
            )
        if rows is Rows.ALL:
            raise UnsupportedMedia(
                "Only text has likelihoods; ask for those of what follows the picture or recording."
            )
        first = part[0]
        if isinstance(first, MediaPosition) and len(part) % first.together:
            raise UnsupportedMedia(
                "A picture whose vectors attend to one another both ways is read whole; give all "
                "of its positions.")
        return self.program.decode(_vectors(part), start)

    def _check(self, length: int) -> None:
        if length > self.context:
            raise ContextExceeded(
                f"The text has {length} tokens and the context holds {self.context}; shorten it."
            )


def _before(positions: Sequence[Position], at: int) -> int:
    """Return `at`, or the beginning of those that are read in one call with it."""
    position = positions[at] if at < len(positions) else 0
    return at if isinstance(position, int) else at - position.behind


def _parted(first: Position, other: Position) -> bool:
    """Whether the two are not read in one call."""
    if isinstance(first, int) or isinstance(other, int):
        return not (isinstance(first, int) and isinstance(other, int))
    return other.together > 1


def _vectors(part: Sequence[Position]) -> torch.Tensor:
    """Return the vectors of `part`, float32[1, T, E]."""
    runs: list[torch.Tensor] = []
    at = 0
    while at < len(part):
        first = part[at]
        assert isinstance(first, MediaPosition)
        assert first.vectors is not None, "what is read has its vectors"
        end = at + 1
        while end < len(part) and part[end] == MediaPosition(
                first.digest, first.place + end - at):
            end += 1
        runs.append(first.vectors[first.place:first.place + end - at])
        at = end
    return torch.cat(runs)[None]
