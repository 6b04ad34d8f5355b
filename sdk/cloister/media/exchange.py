"""What the process that asks and the one that decodes say to each other.

A request is a line of JSON and then the bytes of the file; an answer is three numbers and then
pixels or samples, or nothing. No text comes back.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

# msgspec reads the annotations
from cloister.media.limits import Limits  # noqa: TC001
from cloister.pieces import PictureFormat, RecordingFormat  # noqa: TC001
from cloister.records import Record, Whole

if TYPE_CHECKING:
    from typing import Self

__all__ = ["READY", "Answer", "Code", "Refused", "Request"]

READY = b"+"  # sent once the process has confined itself: it may be given the file
_NUMBERS = struct.Struct("<3Q")
_MOST = 2**64 - 1


class Code(IntEnum):
    """How decoding went; what the two counts of an answer are."""

    DONE = 0  # rows and columns of tiles; of a note, lines and no columns
    UNKNOWN = 1  # no file of a known format
    DAMAGED = 2
    EMPTY = 3  # without pixels or samples
    ANIMATED = 4  # frames
    PIXELS = 5  # width and height
    LONG = 6  # samples at the format's rate
    SAMPLES = 7  # samples of all channels
    RESULT = 8  # bytes
    RATE = 9  # samples a second
    NOT_FINITE = 10
    LOUD = 11
    MEMORY = 12
    LINES = 13  # of text


class Request(Record, frozen=True):
    """What is to be made of the bytes that follow: a picture, or else a recording."""

    limits: Limits
    picture: PictureFormat | None = None
    recording: RecordingFormat | None = None
    size: tuple[int, int] | None = None  # see `parts.Image`
    rate: Whole | None = None  # see `parts.Audio`
    channels: Whole = 1
    trim: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of them."""

    code: Code
    counts: tuple[int, int] = (0, 0)
    data: bytes = b""  # pixels or samples, where it is DONE

    def pack(self) -> bytes:
        """Return the bytes that `unpack` reads."""
        return _NUMBERS.pack(self.code, *(min(count, _MOST) for count in self.counts)) + self.data

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read an answer.

        Raises:
            ValueError: it is too short, or its code is not known.
        """
        if len(raw) < _NUMBERS.size:
            raise ValueError("short")
        code, first, second = _NUMBERS.unpack_from(raw)
        return cls(code=Code(code), counts=(first, second), data=raw[_NUMBERS.size:])


class Refused(Exception):
    """A file that is not decoded, and why; raised and caught in the process that decodes."""

    def __init__(self, code: Code, first: int = 0, second: int = 0) -> None:
        super().__init__(code.name)
        self.answer = Answer(code=code, counts=(first, second))
