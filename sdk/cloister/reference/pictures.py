"""Pictures of lines and notes with their texts, the same from the same seed.

Shapes: H rows, W columns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cloister.errors import DataError
from cloister.reference.degrade import Wear, bent, photographed, printed
from cloister.reference.drawing import Layout, fitted, ink, note, on_paper
from cloister.reference.fonts import Kind
from cloister.reference.lines import LONGEST, label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from cloister.reference.fonts import Face
    from cloister.reference.lines import Texts

__all__ = ["Camera", "Page", "Picture"]

_TRIES = 50  # faces tried for a text
_WEIGHTS = {Kind.SANS: 1.0, Kind.SERIF: 1.0, Kind.MONO: 2.5, Kind.DOTS: 2.0, Kind.HAND: 1.5,
            Kind.DISPLAY: 0.6}
_BESIDE = 0.35  # of the pictures show edges of the lines above and below
_MARGINS = 0.5, 1.5  # ems above and below a note
_HIGHER, _WIDER = (1.5, 4.0), (1.0, 2.0)  # than a note: the blank paper that it is on


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A line as the encoder takes it, uint8[32, W] as `drawing.fitted` makes it, and its text."""

    pixels_HW: np.ndarray
    text: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A note as a user photographs it, uint8[H, W], and the texts of its lines."""

    pixels_HW: np.ndarray
    texts: list[str]


class Camera:
    """A source of pictures of `texts` in `faces`."""

    def __init__(self, texts: Texts, faces: Sequence[Face]) -> None:
        self.texts, self._faces = texts, list(faces)
        sizes: dict[str, int] = {}
        for face in faces:
            sizes[face.family.name] = sizes.get(face.family.name, 0) + 1
        self._weights = [
            _WEIGHTS[face.family.kind] / sizes[face.family.name] for face in faces]

    def line(self, seed: str, *, strength: float, longest: int = LONGEST) -> Picture:
        """Take a picture of a line of up to `longest` characters; `strength` of the wear, 0 to 1.

        Raises:
            DataError: no face draws the text.
        """
        rng = random.Random(seed)
        text = self.texts.line(rng, longest)
        beside = ["", ""]
        if strength and rng.random() < _BESIDE:
            beside = [self.texts.line(rng, longest) for _ in range(2)]
        wear = Wear.drawn(rng, strength)
        layout = Layout.drawn(rng, self._face(rng, text), strength)
        pixels_HW = _taken(layout, wear, rng, text, *beside)
        return Picture(pixels_HW=pixels_HW, text=label(text))

    def note(self, seed: str, *, strength: float) -> list[Picture]:
        """Take pictures of the two to four lines of a note, of one face, layout and wear.

        Raises:
            DataError: no face draws the text.
        """
        rng = random.Random(seed)
        lines = self.texts.note(rng)
        wear = Wear.drawn(rng, strength)
        layout = Layout.drawn(rng, self._face(rng, "".join(lines)), strength)
        around = ["", *lines, ""]
        return [
            Picture(pixels_HW=_taken(layout, wear, rng, text, above, below), text=label(text))
            for above, text, below in zip(around, lines, around[2:], strict=False)
        ]

    def page(self, seed: str, *, strength: float, most: int = 6, blank: bool = False) -> Page:
        """Take one picture of a note of two to `most` lines, which fills it or is on `blank` paper.

        The paper is 1.5 to 4 times as high as the note and 1 to 2 times as wide.

        Raises:
            DataError: no face draws the text.
        """
        rng = random.Random(seed)
        texts = self.texts.note(rng, most)
        wear = Wear.drawn(rng, strength)
        layout = replace(
            Layout.drawn(rng, self._face(rng, "".join(texts)), strength),
            above=rng.uniform(*_MARGINS), below=rng.uniform(*_MARGINS))
        taken = _photograph(note(layout, texts), wear, rng, len(texts), blank=blank)
        return Page(pixels_HW=np.asarray(taken), texts=list(map(label, texts)))

    def _face(self, rng: random.Random, text: str) -> Face:
        """Draw a face that has all of the text."""
        for face in rng.choices(self._faces, self._weights, k=_TRIES):
            if face.draws(text):
                return face
        raise DataError("No font has every character of a text; fetch all of the fonts again.")


def _taken(
    layout: Layout, wear: Wear, rng: random.Random, text: str, above: str, below: str,
) -> np.ndarray:
    return fitted(_photograph(ink(layout, text, above, below), wear, rng))


def _photograph(
    drawn: Image.Image, wear: Wear, rng: random.Random, lines: int = 1, *, blank: bool = False,
) -> Image.Image:
    numbers = np.random.Generator(np.random.SFC64(rng.getrandbits(63)))
    drawn = bent(printed(drawn, wear, numbers), wear, numbers, lines)
    if blank:
        higher, wider = rng.uniform(*_HIGHER), rng.uniform(*_WIDER)
        drawn, lines = on_paper(drawn, higher, wider, rng), round(higher * lines)
    return photographed(drawn, wear, numbers, lines)
