"""A picture of a note, cut into its lines.

They are looked for in a coarse picture of the text, in which letters do not fall into parts; a fine
one tells where there is text, and how near to each other its lines are.

numpy and Pillow only: it runs in the child that decodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.media.exchange import Code, Refused
from cloister.media.page import COARSE, FINE, Page

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["lines"]

_ROWS = 20.0  # from line to line: with fewer, lines are looked for in a larger picture
_LETTERS = 8  # rows of the fine picture: what is lower is a dash, or too small
_LINE = 2.5  # heights of letters, most of which are small: those of a line with its space
_FULL = 0.6  # of the height: in text that is less high lines are looked for again
_ONE = 0.4  # of the height: one line that is less high is cut out
_BESIDE = 1.5  # heights of letters above and below text that is looked at again


def lines(picture: Image.Image, most: int) -> list[Image.Image]:
    """Return pictures of the lines of text in `picture`, from top to bottom, in grey.

    Where it has not two or more, that is `picture` itself, as it was given; but one line that is
    less than two fifths as high is cut out, too. What is cut out has no blank paper beside it.
    Lines have letters: one of dashes alone is not found, columns are not parted, and of a page that
    lies on its side nothing is cut.

    Raises:
        Refused: it looks like over `most`, as bricks may, too.
    """
    found, scale = _lines(picture, most), FINE.of(picture)
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
    return sum(len(Page.of(half, FINE.of(half), FINE.pitch).bands) for half in halves
               if half.height)


def _lines(picture: Image.Image, most: int) -> list[Image.Image]:
    """Return what `lines` does, of one look at the whole."""
    grey = picture.convert("L")
    fine = Page.of(grey, FINE.of(grey), FINE.pitch)
    coarse = Page.of(grey, COARSE.of(grey), COARSE.pitch)
    text = _text(grey, max(fine, coarse, key=lambda page: len(page.bands)))
    if text is not grey:
        fine = Page.of(text, FINE.of(text), FINE.pitch)
    # Lines that are too near for the coarse picture are looked for in a larger one.
    scale = min(fine.scale, max(COARSE.of(text), _ROWS / fine.nearest))
    page = Page.of(text, scale, COARSE.pitch)
    if len(page.bands) < len(fine.bands) and fine.nearest * scale < COARSE.pitch:
        page = fine
    many = max(len(page.bands), len(fine.bands))
    if many > most:
        raise Refused(Code.LINES, many)
    if not page.bands or (len(page.bands) == 1 and (
            text is grey or _LINE * page.bands[0].tall >= _ONE * page.scale * grey.height)):
        return [picture]
    even = page.level(text)
    return [page.cut(even, *edges) for edges in page.edges()]


def _text(grey: Image.Image, page: Page) -> Image.Image:
    """Return the part of the picture that has text, level; `grey` itself where that fills it."""
    tall = max((band.tall for band in page.bands), default=0)
    if tall < _LETTERS:
        return grey
    top, bottom, height = page.bands[0].top, page.bands[-1].bottom, len(page.strongest_H)
    if bottom - top + (_LINE - 1) * tall >= _FULL * height:
        return grey
    return page.cut(
        page.level(grey), max(0, top - _BESIDE * tall), min(height, bottom + _BESIDE * tall))
