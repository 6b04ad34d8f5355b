"""Where a picture has lines of text: their rows, by the ink along them.

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

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

__all__ = ["COARSE", "FINE", "Band", "Page", "Scale"]

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
_SEEN = 0.15  # of a line's strongest ink: rows with less are not its own
_MARGIN = 0.1  # of a line's height, above and below


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The smaller picture that lines are looked for in, at most, and their rows, at least."""

    columns: int
    rows: int
    pitch: int

    def of(self, grey: Image.Image) -> float:
        """Return how large that picture is; `grey` is 1."""
        return min(1.0, self.columns / grey.width, self.rows / grey.height)


COARSE = Scale(columns=640, rows=320, pitch=16)  # in which letters do not fall into parts
FINE = Scale(columns=1920, rows=960, pitch=12)  # in which a printed page has all of its lines


@dataclass(frozen=True, kw_only=True)
class Band:
    """A line's rows, from one valley to the next, and those that most of its letters fill."""

    begin: int
    end: int
    top: int
    bottom: int
    peak: float

    @classmethod
    def of(cls, ink_H: Floats, begin: int, end: int) -> Band:
        """Return the line that has these rows of a page's ink."""
        peak = float(ink_H[begin:end].max())
        filled = np.flatnonzero(ink_H[begin:end] >= peak / 2)
        return cls(begin=begin, end=end, top=begin + int(filled[0]),
                   bottom=begin + int(filled[-1]) + 1, peak=peak)

    @property
    def tall(self) -> int:
        """The height of most of its letters, in rows."""
        return self.bottom - self.top

    @property
    def middle(self) -> float:
        """The row in the middle of its letters."""
        return (self.top + self.bottom) / 2


@dataclass(frozen=True, kw_only=True)
class Page:
    """A picture's lines, and what it takes to make them level."""

    scale: float  # of what follows, in rows; the picture is 1
    bands: list[Band]
    strongest_H: Floats
    columns: tuple[float, float]  # the first and the one behind the last, as shares of the width
    slopes: tuple[float, float]

    @classmethod
    def of(cls, grey: Image.Image, scale: float, pitch: int) -> Page:
        """Look for lines in a picture, made smaller by `scale`, of at least `pitch` rows there."""
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

    def edges(self) -> list[tuple[float, float]]:
        """Return the first row of each line and the one behind its last.

        All reach as far above and below the row that letters stand on.
        """
        above, below = 0, 0
        for band in self.bands:
            ink_H = self.strongest_H[band.begin:band.end]
            seen = np.flatnonzero(ink_H >= _SEEN * ink_H.max()) + band.begin
            above = max(above, band.bottom - int(seen[0]))
            below = max(below, int(seen[-1]) + 1 - band.bottom)
        margin = _MARGIN * (above + below)
        return [(max(band.begin, band.bottom - above - margin),
                 min(band.end, band.bottom + below + margin)) for band in self.bands]

    def level(self, grey: Image.Image) -> Image.Image:
        """Return the picture that this page was found in, its lines level."""
        return _straight(grey, *(slope / self.scale for slope in self.slopes))

    def cut(self, even: Image.Image, top: float, bottom: float) -> Image.Image:
        """Return those rows of the level picture, in the columns that have text."""
        left, right = self.columns
        return even.crop((round(left * even.width), round(top / self.scale),
                          round(right * even.width), round(bottom / self.scale)))


def _columns(ink_HS: Floats, bands: list[Band]) -> tuple[float, float]:
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


def _bands(ink_H: Floats, least: int) -> list[Band]:
    """Return the lines, begun with one for each peak: the least parted are joined first."""
    height = len(ink_H)
    falls, rises = ink_H[1:-1] < ink_H[:-2], ink_H[1:-1] <= ink_H[2:]
    cuts = [0, *(np.flatnonzero(falls & rises) + 1).tolist(), height]
    bands = [Band.of(ink_H, begin, end) for begin, end in pairwise(cuts)]
    while True:
        joined = [(_depth(ink_H, *pair), at) for at, pair in enumerate(pairwise(bands))
                  if not _parted(ink_H, *pair, least)]
        if not joined:
            break
        _, at = max(joined)
        bands[at:at + 2] = [Band.of(ink_H, bands[at].begin, bands[at + 1].end)]
    tallest = max(band.tall for band in bands)
    return [band for band in bands if band.tall >= _CUT * tallest or not (
        band.top == 0 or band.bottom == height)]


def _depth(ink_H: Floats, upper: Band, lower: Band) -> float:
    """Return the ink between two lines, as a share of the lower peak."""
    return float(ink_H[lower.begin]) / max(min(upper.peak, lower.peak), 1e-9)


def _parted(ink_H: Floats, upper: Band, lower: Band, least: int) -> bool:
    apart = lower.middle - upper.middle >= max(least, _APART * max(upper.tall, lower.tall))
    return apart and _depth(ink_H, upper, lower) <= _VALLEY
