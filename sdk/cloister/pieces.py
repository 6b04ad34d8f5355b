"""What a model takes of pictures and recordings, and how a prompt is laid out around them.

Stored in checkpoints and manifests. No torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from cloister.errors import MediaTooLarge, SettingError, UnsupportedMedia
from cloister.parts import Image, Picture, Recording
from cloister.records import Record, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloister.parts import Media

__all__ = [
    "MEDIA", "Fit", "MediaFormats", "PictureFormat", "Piece", "RecordingFormat", "Resample",
    "Tiles",
]

MEDIA = 2**32 - 1
"""Stands among token ids for a vector of a picture or recording: no vocabulary is as large."""

Piece = str | int
"""A text that the prompt has, or a number of vectors of the picture or recording."""


class Fit(StrEnum):
    """How a picture becomes one of the encoder's size."""

    STRETCH = "stretch"  # to the size, whatever its own proportions
    PAD = "pad"  # as large as fits, at the upper left; the rest is filled
    LINE = "line"  # each line of text: to the height, at the left, made even; see `media.line`
    TILES = "tiles"  # cut into pictures of the size, and the whole one behind them


class Resample(StrEnum):
    """The filter by which a picture is made larger or smaller, in Pillow's names."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Tiles(Record, frozen=True):
    """How a picture is cut into tiles, and what the prompt has around them (Idefics 3)."""

    longest_edge: Whole  # pixels that the picture is resized to first
    before: str  # each tile; `{row}` and `{column}` are its numbers from 1
    row_end: str  # behind each row
    whole: str  # before the whole picture
    grid_end: str = ""  # behind the last row, where there are rows


class PictureFormat(Record, frozen=True):
    """The pictures that `vision_encoder` takes, uint8[1, 3, height, width] each."""

    height: Whole  # pixels
    width: Whole
    tokens: Whole  # vectors of one
    fit: Fit
    resample: Resample
    fill: tuple[Whole, Whole, Whole] = (255, 255, 255)  # behind transparency, and around
    marker: str = ""  # what the chat template writes for a picture; "": it knows of none
    before: str = ""  # texts around a picture in the prompt, in place of the marker
    after: str = ""
    both_ways: bool = False  # its vectors attend to one another in both directions
    fewer: bool = False  # the encoder leaves out what says nothing: `tokens` are the most
    tiles: Tiles | None = None

    def __post_init__(self) -> None:
        if not (self.height and self.width and self.tokens) or max(self.fill) > 255:
            raise SettingError("A picture's size, vectors or colour are out of their bounds.")
        if (self.fit is Fit.TILES) != (self.tiles is not None):
            raise SettingError("Pictures are cut into tiles, and how is not said, or not cut.")

    def layout(self, picture: Picture) -> list[Piece]:
        """Return the texts and numbers of vectors that stand for `picture` in a prompt.

        The vectors are those of its tiles in their order. Between lines of a note is a line break.

        Raises:
            UnsupportedMedia: it was decoded for a model that takes others.
        """
        (rows, columns), tiles = picture.grid, self.tiles
        if (picture.height, picture.width) != (self.height, self.width) or (
                rows * columns and tiles is None) or (
                picture.lines > 1 and self.fit is not Fit.LINE):
            raise _decoded_for_another("picture")
        laid_out: list[Piece] = [self.before]
        for _ in range(picture.lines - 1):
            laid_out += [self.tokens, "\n"]
        if tiles is not None and rows * columns:
            for row in range(rows):
                for column in range(columns):
                    laid_out += [_numbered(tiles.before, row + 1, column + 1), self.tokens]
                laid_out.append(tiles.row_end)
            laid_out.append(tiles.grid_end)
        if tiles is not None:
            laid_out.append(tiles.whole)
        return [piece for piece in (*laid_out, self.tokens, self.after) if piece != ""]

    @property
    def texts(self) -> Iterator[str]:
        """Texts that a prompt may have for a picture, each written by no user."""
        yield from (self.marker, self.before, self.after)
        if self.tiles is not None:
            yield from (self.tiles.row_end, self.tiles.grid_end, self.tiles.whole)
            edge = self.tiles.longest_edge
            for row in range(1, -(-edge // self.height) + 1):
                for column in range(1, -(-edge // self.width) + 1):
                    yield _numbered(self.tiles.before, row, column)


class RecordingFormat(Record, frozen=True):
    """The recordings that `audio_encoder` takes, float32[1, 1, samples] of one channel."""

    rate: Whole  # samples a second
    samples_per_token: Whole
    multiple: Whole  # samples; the end is filled with silence up to a multiple of it
    most: Whole  # samples of the longest one
    fewer: bool = False  # see `PictureFormat`
    marker: str = ""  # see `PictureFormat`
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if not (self.rate and self.samples_per_token and self.multiple) or (
                self.multiple % self.samples_per_token or self.most < self.multiple):
            raise SettingError("A recording's rate or lengths are out of their bounds.")

    def padded(self, samples: int) -> int:
        """Return the number of samples that the encoder is given for `samples` of a recording."""
        return -(-samples // self.multiple) * self.multiple

    def layout(self, recording: Recording) -> list[Piece]:
        """Return the texts and the number of vectors that stand for `recording` in a prompt.

        Raises:
            UnsupportedMedia: it was decoded for a model that takes another rate.
            MediaTooLarge: it is over `most`.
        """
        if recording.rate != self.rate:
            raise _decoded_for_another("recording")
        if recording.samples > self.most:
            raise MediaTooLarge(
                f"A recording of {recording.samples / self.rate:.1f} s is over the "
                f"{self.most / self.rate:.1f} s that the model takes; give a shorter one.")
        vectors = self.padded(recording.samples) // self.samples_per_token
        return [piece for piece in (self.before, vectors, self.after) if piece != ""]

    @property
    def texts(self) -> Iterator[str]:
        """Texts that a prompt may have for a recording, each written by no user."""
        yield from (self.marker, self.before, self.after)


class MediaFormats(Record, frozen=True):
    """What a model takes besides text."""

    picture: PictureFormat | None = None
    recording: RecordingFormat | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """What the chat template writes for a picture or recording, where it knows of them."""
        known = (self.picture, self.recording)
        return tuple(each.marker for each in known if each is not None and each.marker)

    @property
    def texts(self) -> Iterator[str]:
        """Texts that a prompt may have for a picture or recording, each written by no user."""
        for each in (self.picture, self.recording):
            if each is not None:
                yield from each.texts

    def of(self, part: Media) -> PictureFormat | RecordingFormat:
        """Return the format that `part` has, or is to be decoded into.

        Raises:
            UnsupportedMedia: the model takes none of its kind.
        """
        picture = isinstance(part, Image | Picture)
        found = self.picture if picture else self.recording
        if found is None:
            raise UnsupportedMedia(
                f"The model takes no {'pictures' if picture else 'recordings'}; name a bundle "
                "that does.")
        return found

    def vectors(self, part: Media) -> int:
        """Return how many vectors `part` has at most in a prompt; see `layout`."""
        return sum(piece for piece in self.layout(part) if isinstance(piece, int))

    def layout(self, part: Media) -> list[Piece]:
        """Return what stands for `part` in a prompt; see `PictureFormat.layout`.

        Raises:
            UnsupportedMedia: the model takes none of its kind or size, or it is not decoded.
            MediaTooLarge: see `RecordingFormat.layout`.
        """
        found = self.of(part)
        if isinstance(found, PictureFormat) and isinstance(part, Picture):
            return found.layout(part)
        if isinstance(found, RecordingFormat) and isinstance(part, Recording):
            return found.layout(part)
        raise UnsupportedMedia(
            "A picture or recording is not decoded; do so with `cloister.media.read` first.")


def _numbered(text: str, row: int, column: int) -> str:
    return text.replace("{row}", str(row)).replace("{column}", str(column))


def _decoded_for_another(what: str) -> UnsupportedMedia:
    return UnsupportedMedia(
        f"A {what} was decoded for a model that takes others; give the file or array again.")
