"""A line of text as ink, and a picture of a line as the encoder takes it.

Shapes: H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from cloister.media.line import line

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cloister.reference.fonts import Face

__all__ = ["HEIGHT", "WIDTH", "Layout", "fitted", "ink", "note", "on_paper"]

HEIGHT = 32  # pixels of every picture
WIDTH = 512  # pixels at most
_SIZES = 22, 34  # pixels of an em; few, so that every face can stay open
_TALL, _DEEP = "Hbdfkl(|", "gpqyj(|"  # letters that reach up and down


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The face of a line and the space around its letters."""

    face: Face
    size: int  # pixels of the em
    pitch: float  # from line to line, in ems
    above: float  # from the ascender to the upper edge, in ems; below 0 it is cut
    below: float  # from the descender to the lower edge, in ems
    side: float  # before the first letter and after the last, in ems
    spacing: int  # pixels between letters beyond the face's own
    hugging: bool  # edges measured from this text's own letters: capitals fill the height
    bitmap: bool  # no grey at the edges, as thermal printers print

    @classmethod
    def drawn(cls, rng: random.Random, face: Face, strength: float) -> Layout:
        """Draw a layout; with `strength`, 0 to 1, closer to its neighbours and off centre."""
        tight = strength * 0.12
        return cls(
            face=face, size=rng.choice(_SIZES), pitch=rng.uniform(1.1, 1.6),
            above=rng.uniform(-tight, 0.25), below=rng.uniform(-tight, 0.25),
            side=rng.choice((0.05, 0.2, rng.uniform(0, 1.5))),
            spacing=rng.choice((1, 2, 3)) if rng.random() < 0.15 else 0,
            hugging=rng.random() < 0.35, bitmap=rng.random() < 0.3 * strength)


def ink(layout: Layout, text: str, above: str = "", below: str = "") -> Image.Image:
    """Draw `text`, black on nothing, with what is seen of the lines beside it; mode L, 255 is ink.

    The height is that of the face's ascender and descender and of the layout's margins.
    """
    return _drawn(layout, [text], above, below)


def note(layout: Layout, texts: Sequence[str]) -> Image.Image:
    """Draw `texts`, one below the other at the layout's pitch, otherwise as `ink` does."""
    return _drawn(layout, texts, "", "")


def on_paper(drawn: Image.Image, higher: float, wider: float, rng: random.Random) -> Image.Image:
    """Return an image so many times as high and wide, with `drawn` somewhere on it."""
    paper = Image.new("L", (round(wider * drawn.width), round(higher * drawn.height)))
    left = rng.randint(0, paper.width - drawn.width)
    paper.paste(drawn, (left, rng.randint(0, paper.height - drawn.height)))
    return paper


def _drawn(layout: Layout, texts: Sequence[str], above: str, below: str) -> Image.Image:
    font = layout.face.at(layout.size)
    ascent, descent = font.getmetrics()
    # Some faces leave much room for marks over capitals: lines are measured by what is written.
    tall, deep = ("".join(texts),) * 2 if layout.hugging else (_TALL, _DEEP)
    top, bottom = max(0, font.getbbox(tall)[1]), min(ascent + descent, font.getbbox(deep)[3])
    size = layout.size
    if bottom - top < size / 2:  # of dashes or small letters alone no line is as high as they are
        top, bottom = font.getbbox(_TALL)[1], font.getbbox(_TALL)[3]
    pitch = round(layout.pitch * size)
    height = round(bottom - top) + round((layout.above + layout.below) * size)
    height += pitch * (len(texts) - 1)
    baseline = round(layout.above * size - top)
    side = round(layout.side * size) + 2
    width = 2 * side + max(
        max(1, round(font.getlength(text))) + layout.spacing * max(0, len(text) - 1)
        for text in texts)
    image = Image.new("L", (width, max(8, height)))
    draw = ImageDraw.Draw(image)
    draw.fontmode = "1" if layout.bitmap else "L"
    for place, written in enumerate((above, *texts, below), start=-1):
        y = baseline + place * pitch
        if not written:
            continue
        if layout.spacing == 0:
            draw.text((side, y), written, fill=255, font=font)
            continue
        x = float(side)
        for character in written:
            draw.text((x, y), character, fill=255, font=font)
            x += font.getlength(character) + layout.spacing
    return image


def fitted(image: Image.Image, width: int | None = None) -> NDArray[np.uint8]:
    """Return a picture of a line as the encoder takes it: uint8[32, W], 255 where nothing is.

    As `cloister.media.line` makes it, which a user's pictures go through, too; then filled up with
    255 on the right to `width` columns, if one is given.
    """
    line_HW = np.asarray(line(image, HEIGHT, WIDTH))
    if width is not None and width > line_HW.shape[1]:
        padding = ((0, 0), (0, width - line_HW.shape[1]))
        line_HW = np.pad(line_HW, padding, constant_values=255)
    return line_HW
