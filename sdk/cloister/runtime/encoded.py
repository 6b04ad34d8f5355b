"""Pictures and recordings as positions: what they are called, and their vectors when they are read.

Shapes: N vectors, E size of a vector.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Protocol

from cloister.parts import Picture
from cloister.runtime.core import DIGEST_BYTES, MediaPosition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from cloister.parts import Recording
    from cloister.runtime.core import Position

__all__ = ["Encoded", "Kept", "digest", "made_s"]


class Kept(Protocol):
    """Where vectors of pictures and recordings are put back from."""

    @property
    def media_key(self) -> bytes:
        """The key of the digests that they are found by."""
        ...

    def fetch_media(self, digest: bytes) -> torch.Tensor | None:
        """Return the vectors, float32[N, E]; None where they are not kept."""
        ...


class Encoded:
    """The vectors of the picture or recording called `name`, made when they are first read.

    They come out of `kept` where they are there. What was cached of them is not read, so that it is
    not encoded either.
    """

    def __init__(
        self, name: bytes, encode: Callable[[], torch.Tensor], kept: Kept | None
    ) -> None:
        self._name, self._encode, self._kept = name, encode, kept
        self.made: torch.Tensor | None = None  # float32[N, E]
        self.made_s = 0.0

    def __getitem__(self, places: slice, /) -> torch.Tensor:
        if self.made is None and self._kept is not None:
            self.made = self._kept.fetch_media(self._name)
        if self.made is None:
            began = time.perf_counter()
            self.made = self._encode()
            self.made_s = time.perf_counter() - began
        return self.made[places]


def digest(key: bytes, part: Picture | Recording) -> bytes:
    """Return the keyed digest of a picture or recording: of its kind, size and content."""
    if isinstance(part, Picture):
        header = f"picture {part.height} {part.width} {part.grid[0]} {part.grid[1]}"
    else:
        header = f"recording {part.rate}"
    found = hashlib.blake2b(header.encode() + b"\0", key=key, digest_size=DIGEST_BYTES)
    found.update(part.data)
    return found.digest()


def made_s(read: Sequence[Position]) -> float:
    """Return the seconds that the vectors of what was read took to encode."""
    made = {
        id(each.vectors): each.vectors.made_s for each in read
        if isinstance(each, MediaPosition) and isinstance(each.vectors, Encoded)}
    return sum(made.values())
