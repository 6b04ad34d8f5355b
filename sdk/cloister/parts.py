"""Pictures and recordings as parts of a message: as they were given, and as a model takes them.

`Image` and `Audio` are what a caller has: the bytes of a file, or samples. `cloister.media` decodes
them, in a process of their own, into a `Picture` or a `Recording`, which hold nothing else: no
metadata goes further. No repr shows content.
"""

from __future__ import annotations

import array
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec

from cloister.errors import MediaTooLarge, MediaUnreadable, SettingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import IO

__all__ = [
    "LIMIT_BYTES", "Audio", "Content", "Image", "Media", "Picture", "Recording", "one_by_one",
]

LIMIT_BYTES = 32 << 20  # of a file, or of samples
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class _Array(Protocol):
    """An array of numpy, or its equal."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> object: ...
    def tobytes(self) -> bytes: ...


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=str.lower):
    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Image(_Part, frozen=True):
    """A picture as it was given: the bytes of a PNG, JPEG or WebP file, or pixels."""

    label: ClassVar[str] = "picture"  # its size is known once it is decoded

    data: bytes
    size: tuple[int, int] | None = None  # height and width, where `data` are uint8[H, W, 3]

    @classmethod
    def open(cls, source: str | Path | IO[bytes]) -> Image:
        """Read a file of this machine, or one that is open.

        Raises:
            MediaUnreadable: there is no such file, or it is a URL: nothing is ever fetched.
            MediaTooLarge: it is over LIMIT_BYTES.
        """
        return cls(data=_read(source))

    @classmethod
    def of(cls, pixels: _Array) -> Image:
        """Take the pixels of an array, uint8[H, W, 3] in red, green and blue.

        Raises:
            SettingError: an array of another type or shape.
            MediaTooLarge: it is over LIMIT_BYTES.
        """
        shape = pixels.shape
        if str(pixels.dtype) != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise SettingError(
                f"The pixels are {pixels.dtype} of shape {list(shape)}; give uint8 of height, "
                "width and 3 colours.")
        return cls(data=_bounded(pixels.tobytes()), size=(shape[0], shape[1]))


class Audio(_Part, frozen=True):
    """A recording as it was given: the bytes of a WAV, FLAC, Ogg or MP3 file, or samples."""

    label: ClassVar[str] = "recording"

    data: bytes
    rate: int | None = None  # samples a second, where `data` are float32[samples, channels]
    channels: int = 1
    trim: bool = False  # leave its quiet beginning and end out

    @classmethod
    def open(cls, source: str | Path | IO[bytes], *, trim: bool = False) -> Audio:
        """Read a file of this machine, or one that is open; see `Image.open`."""
        return cls(data=_read(source), trim=trim)

    @classmethod
    def of(cls, samples: _Array, *, rate: int, trim: bool = False) -> Audio:
        """Take the samples of an array, float32[N] or float32[N, channels] from -1 to 1.

        Raises:
            SettingError: an array of another type or shape, or a rate that is not above 0.
            MediaTooLarge: it is over LIMIT_BYTES.
        """
        shape = samples.shape
        if str(samples.dtype) != "float32" or len(shape) not in (1, 2) or 0 in shape[1:]:
            raise SettingError(
                f"The samples are {samples.dtype} of shape {list(shape)}; give float32 of samples, "
                "or of samples and channels.")
        return cls(
            data=_bounded(samples.tobytes()), rate=_rate(rate),
            channels=shape[1] if len(shape) == 2 else 1, trim=trim)

    @classmethod
    def of_chunks(
        cls, chunks: Iterable[bytes], *, rate: int, channels: int = 1, trim: bool = False
    ) -> Audio:
        """Take what a microphone gives chunk by chunk: signed 16-bit samples, channels by turns.

        Raises:
            SettingError: a rate or number of channels that is not above 0.
            MediaUnreadable: the chunks end within a sample.
            MediaTooLarge: more than LIMIT_BYTES; no further chunk is read.
        """
        if channels < 1:
            raise SettingError(f"channels is {channels}; it must be at least 1.")
        raw = bytearray()
        for chunk in chunks:
            raw += chunk
            if 2 * len(raw) > LIMIT_BYTES:  # of four bytes a sample
                raise _too_large()
        if len(raw) % (2 * channels):
            raise MediaUnreadable("The recording ends within a sample; give whole ones.")
        samples = array.array("f", (value / 32768 for value in array.array("h", bytes(raw))))
        return cls(data=samples.tobytes(), rate=_rate(rate), channels=channels, trim=trim)


class Picture(_Part, frozen=True):
    """A decoded picture: one tile or several of one size, and nothing but their pixels."""

    data: bytes  # uint8[tiles, 3, height, width]
    height: int
    width: int
    grid: tuple[int, int] = (0, 0)  # rows and columns of tiles, the whole picture behind them
    lines: int = 1  # of a note, a tile each; one where there is a grid

    def __post_init__(self) -> None:
        size = self.tiles * 3 * self.height * self.width
        if min(self.height, self.width, self.lines) < 1 or min(self.grid) < 0 or (
                self.lines > 1 and self.grid != (0, 0)) or len(self.data) != size:
            raise MediaUnreadable("A picture is not as large as it says; decode it again.")

    @property
    def tiles(self) -> int:
        """Pictures that the encoder is given: those of the grid, and the whole one; or lines."""
        return self.grid[0] * self.grid[1] + self.lines

    @property
    def label(self) -> str:
        """What it is, in words that tell nothing of its content."""
        if self.lines > 1:
            return f"picture of {self.lines} lines"
        rows, columns = max(1, self.grid[0]), max(1, self.grid[1])
        return f"picture {columns * self.width} x {rows * self.height}"


class Recording(_Part, frozen=True):
    """A decoded recording of one channel, and nothing but its samples."""

    data: bytes  # float32[samples], from -1 to 1
    rate: int  # samples a second

    def __post_init__(self) -> None:
        if self.rate < 1 or len(self.data) % 4 or not self.data:
            raise MediaUnreadable("A recording is not as long as it says; decode it again.")

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.data) // 4

    @property
    def label(self) -> str:
        """What it is, in words that tell nothing of its content."""
        return f"recording {self.samples / self.rate:.1f} s"


Media = Image | Audio | Picture | Recording
"""A part of a message that is no text."""

Content = str | tuple[str | Media, ...]
"""What a message says: a text, or texts, pictures and recordings in any order."""


def one_by_one(parts: Iterable[Picture | Recording]) -> Iterator[Picture | Recording]:
    """Yield `parts`, but of a note each line as a picture of its own."""
    for part in parts:
        if isinstance(part, Recording) or part.lines == 1:
            yield part
            continue
        size = len(part.data) // part.lines
        for begin in range(0, len(part.data), size):
            yield Picture(
                data=part.data[begin:begin + size], height=part.height, width=part.width)


def _read(source: str | Path | IO[bytes]) -> bytes:
    try:
        if not isinstance(source, str | Path):
            return _bounded(source.read(LIMIT_BYTES + 1))
        if isinstance(source, str) and _URL.match(source) and not Path(source).exists():
            raise MediaUnreadable(
                "A URL was given as a file; nothing is fetched: give a local file.")
        with Path(source).open("rb") as file:
            return _bounded(file.read(LIMIT_BYTES + 1))
    except (OSError, ValueError):
        raise MediaUnreadable(
            "A picture or recording cannot be read from its file; check the path.") from None


def _bounded(data: bytes) -> bytes:
    if len(data) > LIMIT_BYTES:
        raise _too_large()
    return data


def _too_large() -> MediaTooLarge:
    return MediaTooLarge(
        f"A picture or recording is over {LIMIT_BYTES >> 20} MiB; give a smaller one.")


def _rate(rate: int) -> int:
    if rate < 1:
        raise SettingError(f"rate is {rate}; it must be at least 1 sample a second.")
    return rate
