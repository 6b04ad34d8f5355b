"""A picture of a note, cut into its lines.

Ink is told by differences of grey along the rows, divided by the light around: shadows and the
colour of paper have none. Their sums over rows rise and fall with the lines where the picture is
level (W. Postl, "Detection of linear oblique structures and skew scan in digitized documents", ICPR
1986); top and bottom have slopes of their own, as a page has that is seen from the side.

numpy and Pillow only: it runs in the child that decodes.

Shapes: H rows, W columns, S strips, which are parts of the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter, ImageStat

from cloister.media.exchange import Code, Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

__all__ = ["lines"]

_STRIPS = 16
_AROUND = 24  # pixels to each side that the light on one is told from, at most
_QUIET = 0.1  # share of the rows that have no ink, anywhere along them
_SLOPES = np.linspace(-0.06, 0.06, 13)  # rise over width, up to 3.4 degrees
_FAN = 0.1  # of the height: how much further apart the lines are at one end, at most
_STEADY = 0.5, 0.3  # what a slope, and a fan, has to gain
_VALLEY = 0.5  # of two lines' lower peak: with more between them they are one
_APART = 1.15  # heights of letters from line to line, at least: the dot of an i is nearer
_STRONG = 0.25  # of the strongest ink: what has less is the paper, or its other side
_SURE = 1.3  # times the noise: with less there is no ink
_CUT = 0.6  # of the tallest letters: what is lower, at an edge, is of a line beyond it
_ROWS = 20.0  # of the coarse picture, from line to line, at least
_SEEN = 0.15  # of a line's strongest ink: rows with less are not its own
_MARGIN = 0.1  # of a line's height, above and below
_LETTERS = 8  # rows of the fine picture: what is lower is a dash, or too small
_LINE = 2.5  # heights of letters, most of which are small: those of a line with its space
_FULL = 0.6  # of the height: in text that is less high lines are looked for again
_ONE = 0.4  # of the height: one line that is less high is cut out
_BESIDE = 1.5  # heights of letters above and below text that is looked at again


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """The smaller picture that lines are looked for in, at most, and their rows, at least."""

    columns: int
    rows: int
    pitch: int

    def of(self, grey: Image.Image) -> float:
        """Return how large that picture is; `grey` is 1."""
        return min(1.0, self.columns / grey.width, self.rows / grey.height)


_COARSE = _Scale(columns=640, rows=320, pitch=16)  # in which letters do not fall into parts
_FINE = _Scale(columns=1920, rows=960, pitch=12)  # in which a printed page has all of its lines


@dataclass(frozen=True, kw_only=True)
class _Band:
    """A line's rows, from one valley to the next, and those that most of its letters fill."""

    begin: int
    end: int
    top: int
    bottom: int
    peak: float

    @classmethod
    def of(cls, ink_H: Floats, begin: int, end: int) -> _Band:
        peak = float(ink_H[begin:end].max())
        filled = np.flatnonzero(ink_H[begin:end] >= peak / 2)
        return cls(begin=begin, end=end, top=begin + int(filled[0]),
                   bottom=begin + int(filled[-1]) + 1, peak=peak)

    @property
    def tall(self) -> int:
        return self.bottom - self.top

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2


@dataclass(frozen=True, kw_only=True)
class _Page:
    """A picture's lines, and what it takes to make them level."""

    scale: float  # of what follows, in rows; the picture is 1
    bands: list[_Band]
    strongest_H: Floats
    columns: tuple[float, float]  # the first and the one behind the last, as shares of the width
    slopes: tuple[float, float]

    @classmethod
    def of(cls, grey: Image.Image, scale: float, pitch: int) -> _Page:
        size = max(1, round(grey.width * scale)), max(1, round(grey.height * scale))
        small = grey if size == grey.size else grey.resize(size, Image.Resampling.BOX)
        scale = small.height / grey.height
        if small.width < 2 * _STRIPS or small.height < 2 * pitch:
            return cls(scale=scale, bands=[], strongest_H=np.zeros(small.height), columns=(0, 1),
                       slopes=(0, 0))
        ink_HS, noise = _ink(small)
        slopes = _slopes(ink_HS, small.width)
        ink_HS = _level(ink_HS, *slopes)
        strongest_H = _smooth(ink_HS.max(axis=1))
        bands = [
            band for band in _bands(_smooth(np.sqrt((ink_HS**2).mean(axis=1))), pitch)
            if strongest_H[band.begin:band.end].max() >= max(
                _STRONG * strongest_H.max(), _SURE * noise)]
        return cls(scale=scale, bands=bands, strongest_H=strongest_H,
                   columns=_columns(ink_HS, bands), slopes=slopes)

    @property
    def nearest(self) -> float:
        """The rows of the picture from one line to the next, at least."""
        return min((lower.middle - upper.middle for upper, lower in pairwise(self.bands)),
                   default=math.inf) / self.scale

    def level(self, grey: Image.Image) -> Image.Image:
        """Return the picture that this page was found in, its lines level."""
        return _straight(grey, *(slope / self.scale for slope in self.slopes))

    def cut(self, even: Image.Image, top: float, bottom: float) -> Image.Image:
        """Return those rows of the level picture, in the columns that have text."""
        left, right = self.columns
        return even.crop((round(left * even.width), round(top / self.scale),
                          round(right * even.width), round(bottom / self.scale)))


def lines(picture: Image.Image, most: int) -> list[Image.Image]:
    """Return pictures of the lines of text in `picture`, from top to bottom, in grey.

    Where it has not two or more, that is `picture` itself, as it was given; but one line that is
    less than two fifths as high is cut out, too. What is cut out has no blank paper beside it.
    Lines have letters: one of dashes alone is not found, columns are not parted, and of a page that
    lies on its side nothing is cut.

    Raises:
        Refused: it looks like over `most`, as bricks may, too.
    """
    found, scale = _lines(picture, most), _FINE.of(picture)
    if scale == 1:
        return found
    # In a picture that was shrunk, small lines that stand together may be one, or nothing.
    if len(found) > 1:
        found = _again(found, scale, most)
        many = len(found)
    else:
        many = _in_halves(picture)
    if many > most:
        raise Refused(Code.LINES, many)
    return found


def _again(found: list[Image.Image], scale: float, most: int) -> list[Image.Image]:
    """Return lines of which those are parted that have lines too small for such a scale."""
    parted = [_lines(each, most) for each in found]
    return [line for each, parts in zip(found, parted, strict=True) for line in (
        parts if each.height * scale < _ROWS * len(parts) else [each])]


def _in_halves(picture: Image.Image) -> int:
    """Return the number of lines that two looks see, at the upper half and at the lower."""
    middle, grey = picture.height // 2, picture.convert("L")
    halves = grey.crop((0, 0, grey.width, middle)), grey.crop((0, middle, *grey.size))
    return sum(len(_Page.of(half, _FINE.of(half), _FINE.pitch).bands) for half in halves
               if half.height)


def _lines(picture: Image.Image, most: int) -> list[Image.Image]:
    """Return what `lines` does, of one look at the whole."""
    grey = picture.convert("L")
    fine = _Page.of(grey, _FINE.of(grey), _FINE.pitch)
    coarse = _Page.of(grey, _COARSE.of(grey), _COARSE.pitch)
    text = _text(grey, max(fine, coarse, key=lambda page: len(page.bands)))
    if text is not grey:
        fine = _Page.of(text, _FINE.of(text), _FINE.pitch)
    # Lines that are nearer than the coarse page could tell are looked for in a larger one.
    scale = min(fine.scale, max(_COARSE.of(text), _ROWS / fine.nearest))
    page = _Page.of(text, scale, _COARSE.pitch)
    if len(page.bands) < len(fine.bands) and fine.nearest * scale < _COARSE.pitch:
        page = fine
    many = max(len(page.bands), len(fine.bands))
    if many > most:
        raise Refused(Code.LINES, many)
    if not page.bands or len(page.bands) == 1 and (
            text is grey or _LINE * page.bands[0].tall >= _ONE * page.scale * grey.height):
        return [picture]
    even = page.level(text)
    return [page.cut(even, *edges) for edges in _edges(page)]


def _text(grey: Image.Image, page: _Page) -> Image.Image:
    """Return the part of the picture that has text, level; `grey` itself where that fills it."""
    tall = max((band.tall for band in page.bands), default=0)
    if tall < _LETTERS:
        return grey
    top, bottom, height = page.bands[0].top, page.bands[-1].bottom, len(page.strongest_H)
    if bottom - top + (_LINE - 1) * tall >= _FULL * height:
        return grey
    return page.cut(
        page.level(grey), max(0, top - _BESIDE * tall), min(height, bottom + _BESIDE * tall))


def _columns(ink_HS: Floats, bands: list[_Band]) -> tuple[float, float]:
    """Return the shares of the width between which there is ink, and a strip to each side."""
    if not bands:
        return 0, 1
    strongest_S = np.max([ink_HS[band.top:band.bottom].max(axis=0) for band in bands], axis=0)
    seen = np.flatnonzero(strongest_S >= _SEEN * strongest_S.max())
    return max(0, int(seen[0]) - 1) / _STRIPS, min(_STRIPS, int(seen[-1]) + 2) / _STRIPS


def _ink(grey: Image.Image) -> tuple[Floats, float]:
    """Return how much more than noise is in each strip of each row, float[H, S], and the noise."""
    around = grey.filter(ImageFilter.BoxBlur(min(grey.height // 4, _AROUND)))
    soft_HW = np.asarray(grey.filter(ImageFilter.BoxBlur(1)), np.float32)
    soft_HW = soft_HW / (np.asarray(around, np.float32) + 16)
    differences_HW = np.abs(soft_HW[:, 2:] - soft_HW[:, :-2])
    edges = np.linspace(0, differences_HW.shape[1], _STRIPS + 1).round().astype(int)
    ink_HS = _smooth(np.add.reduceat(differences_HW, edges[:-1], axis=1) / np.diff(edges))
    noise_S = np.sort(ink_HS, axis=0)[round(_QUIET * len(ink_HS))]
    return np.maximum(ink_HS - noise_S, 0), float(noise_S.mean())


def _smooth(values: Floats) -> Floats:
    """Return weighted means of five rows, float[H] or float[H, S]."""
    padded = np.pad(values, [(2, 2)] + [(0, 0)] * (values.ndim - 1), mode="edge")
    rows = len(values)
    weighted = (weight * padded[at:at + rows] for at, weight in enumerate((1, 2, 3, 2, 1)))
    return sum(weighted, np.zeros_like(values)) / 9


def _slopes(ink_HS: Floats, width: int) -> tuple[float, float]:
    """Return by how many rows the lines fall from left to right, at the top and at the bottom."""
    height, best, found = len(ink_HS), -1.0, (0.0, 0.0)
    for top, bottom in product(_SLOPES, repeat=2):
        fan = abs(top - bottom) * width / height
        if fan > _FAN:
            continue
        sharp = float((_level(ink_HS, top * width, bottom * width).sum(axis=1)**2).sum())
        sharp *= 1 - _STEADY[0] * (abs(top) + abs(bottom)) - _STEADY[1] * fan
        if sharp > best:
            best, found = sharp, (float(top * width), float(bottom * width))
    return found


def _level(ink_HS: Floats, top: float, bottom: float) -> Floats:
    """Return the ink with each strip moved so that lines of such slopes are level."""
    height, strips = ink_HS.shape
    y_H1 = np.arange(height)[:, None]
    x_S = (np.arange(strips) + 0.5) / strips - 0.5
    from_HS = np.rint(y_H1 + (top + (bottom - top) * y_H1 / height) * x_S).astype(int)
    inside = (from_HS >= 0) & (from_HS < height)
    moved = np.take_along_axis(ink_HS, from_HS.clip(0, height - 1), axis=0)
    return np.where(inside, moved, 0)


def _straight(grey: Image.Image, top: float, bottom: float) -> Image.Image:
    """Return the picture with lines of such slopes level, as `_level` does."""
    if not (top or bottom):
        return grey
    width, height = grey.size
    corners = (0, -top / 2, 0, height - bottom / 2, width, height + bottom / 2, width, top / 2)
    return grey.transform(
        grey.size, Image.Transform.QUAD, corners, Image.Resampling.BILINEAR,
        fillcolor=ImageStat.Stat(grey).median[0])


def _bands(ink_H: Floats, least: int) -> list[_Band]:
    """Return the lines, begun with one for each peak: the least parted are joined first."""
    height = len(ink_H)
    falls, rises = ink_H[1:-1] < ink_H[:-2], ink_H[1:-1] <= ink_H[2:]
    cuts = [0, *(np.flatnonzero(falls & rises) + 1).tolist(), height]
    bands = [_Band.of(ink_H, begin, end) for begin, end in pairwise(cuts)]
    while True:
        joined = [(_depth(ink_H, *pair), at) for at, pair in enumerate(pairwise(bands))
                  if not _parted(ink_H, *pair, least)]
        if not joined:
            break
        _, at = max(joined)
        bands[at:at + 2] = [_Band.of(ink_H, bands[at].begin, bands[at + 1].end)]
    tallest = max(band.tall for band in bands)
    return [band for band in bands if band.tall >= _CUT * tallest or not (
        band.top == 0 or band.bottom == height)]


def _depth(ink_H: Floats, upper: _Band, lower: _Band) -> float:
    """Return the ink between two lines, as a share of the lower peak."""
    return float(ink_H[lower.begin]) / max(min(upper.peak, lower.peak), 1e-9)


def _parted(ink_H: Floats, upper: _Band, lower: _Band, least: int) -> bool:
    apart = lower.middle - upper.middle >= max(least, _APART * max(upper.tall, lower.tall))
    return apart and _depth(ink_H, upper, lower) <= _VALLEY


def _edges(page: _Page) -> list[tuple[float, float]]:
    """Return the first row of each line and the one behind its last.

    All reach as far above and below the row that letters stand on.
    """
    above, below = 0, 0
    for band in page.bands:
        ink_H = page.strongest_H[band.begin:band.end]
        seen = np.flatnonzero(ink_H >= _SEEN * ink_H.max()) + band.begin
        above = max(above, band.bottom - int(seen[0]))
        below = max(below, int(seen[-1]) + 1 - band.bottom)
    margin = _MARGIN * (above + below)
    return [(max(band.begin, band.bottom - above - margin),
             min(band.end, band.bottom + below + margin)) for band in page.bands]
