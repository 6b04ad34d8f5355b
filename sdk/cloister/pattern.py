"""Pictures and recordings of noise, the same on every machine, to prove a program with."""

from __future__ import annotations

import array
import hashlib
import sys
from typing import TYPE_CHECKING

from cloister.parts import Picture, Recording

if TYPE_CHECKING:
    from cloister.pieces import MediaFormats, PictureFormat, RecordingFormat

__all__ = ["of", "picture", "recording"]

_LOUD = 8  # a share of full scale
_VECTORS = 24


def of(media: MediaFormats | None, kind: str, seed: int, wobble: int = 0) -> Picture | Recording:
    """Return the picture or recording of a `kind` that `media` has."""
    form = getattr(media, kind)
    return picture(form, seed, wobble) if kind == "picture" else recording(form, seed, wobble)


def picture(form: PictureFormat, seed: int, wobble: int = 0) -> Picture:
    """Return a picture of one tile; another `wobble` changes each pixel by one step at most."""
    size = 3 * form.height * form.width
    pixels = bytearray(_noise("picture", seed, size))
    if wobble:
        for at, step in enumerate(_noise("wobble", wobble, size)):
            pixels[at] = min(255, max(0, pixels[at] + step % 3 - 1))
    return Picture(data=bytes(pixels), height=form.height, width=form.width)


def recording(form: RecordingFormat, seed: int, wobble: int = 0) -> Recording:
    """Return a recording of _VECTORS vectors, or as near to it as the encoder takes.

    Another `wobble` changes each sample by a hundredth at most.
    """
    steps = -(-_VECTORS * form.samples_per_token // form.multiple)
    length = min(steps, form.most // form.multiple) * form.multiple
    values = _sixteen_bits("recording", seed, length)
    other = _sixteen_bits("wobble", wobble, length)
    samples = array.array("f", (
        (value + (step / 100 if wobble else 0.0)) / 32768 / _LOUD
        for value, step in zip(values, other, strict=True)))
    return Recording(data=samples.tobytes(), rate=form.rate)


def _sixteen_bits(label: str, seed: int, count: int) -> array.array[int]:
    values = array.array("h", _noise(label, seed, 2 * count))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _noise(label: str, seed: int, size: int) -> bytes:
    return hashlib.shake_128(f"{label} {seed}".encode()).digest(size)
