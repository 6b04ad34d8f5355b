"""Pictures and recordings as positions: what they are called, and their vectors when they are read.

Shapes: N vectors, E size of a vector.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Protocol

import torch

from cloister.parts import Picture, Recording
from cloister.pieces import PictureFormat, RecordingFormat
from cloister.runtime.core import DIGEST_BYTES, MediaPosition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloister.runtime.core import Position, Vectors
    from cloister.runtime.program import Program

__all__ = ["Encoded", "Kept", "Medium", "digest", "encode", "made_s", "positions"]

Medium = Picture | Recording


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


def digest(key: bytes, part: Medium) -> bytes:
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


def encode(program: Program, form: PictureFormat | RecordingFormat, part: Medium) -> torch.Tensor:
    """Return the vectors of a picture, tile by tile, or of a recording, float32[N, E].

    Behind a recording there is silence up to a length that the encoder takes.
    """
    if isinstance(part, Picture):
        pixels = torch.frombuffer(bytearray(part.data), dtype=torch.uint8)
        tiles = pixels.view(part.tiles, 1, 3, part.height, part.width)
        return torch.cat([program.see(tile)[0].clone() for tile in tiles])
    assert isinstance(form, RecordingFormat)
    padded = torch.zeros(1, 1, form.padded(part.samples))
    padded[0, 0, :part.samples] = torch.frombuffer(bytearray(part.data), dtype=torch.float32)
    return program.hear(padded)[0].clone()


def positions(
    form: PictureFormat | RecordingFormat, name: bytes, vectors: Vectors, count: int
) -> list[MediaPosition]:
    """Return the positions of what is called `name`, and has `count` of `vectors`."""
    together = form.tokens if isinstance(form, PictureFormat) and form.both_ways else 1
    return [MediaPosition(name, place, vectors, together) for place in range(count)]
