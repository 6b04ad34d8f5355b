"""Wear: what happens to ink on its way from a printer, over paper and a camera, to a picture.

Shapes: H rows, W columns. Every effect has a strength from 0, which changes nothing, to 1; the same
generator of random numbers gives the same picture. numpy and Pillow only.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from cloister.errors import SettingError

if TYPE_CHECKING:
    import random

    from numpy.random import Generator

__all__ = ["Wear", "bent", "photographed", "printed"]

_CELL = 48  # columns of a piece of bent paper


@dataclass(frozen=True, kw_only=True)
class Wear:
    """Strengths of the effects, each from 0 to 1.

    Raises:
        SettingError: a strength is out of bounds.
    """

    tilt: float = 0.0  # turned and seen from the side
    crumple: float = 0.0  # paper out of its plane
    faint: float = 0.0  # too little ink, in spots
    thermal: float = 0.0  # dots, dead columns, fading along the line
    coarse: float = 0.0  # few pixels a letter
    blur: float = 0.0  # out of focus or moved
    light: float = 0.0  # gradients and shadows
    paper: float = 0.0  # dark or coarse paper, low contrast
    bleed: float = 0.0  # print of the other side
    noise: float = 0.0  # of the sensor
    jpeg: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise SettingError(f"{field.name} is {value}; it must lie between 0 and 1.")

    @classmethod
    def drawn(cls, rng: random.Random, strength: float) -> Wear:
        """Draw some effects, more and stronger with `strength`."""
        return cls(**{
            field.name: rng.random() ** 0.7 * strength if rng.random() < _OFTEN[field.name] else 0.0
            for field in fields(cls)})


_OFTEN = {"tilt": 0.6, "crumple": 0.3, "faint": 0.3, "thermal": 0.35, "coarse": 0.25, "blur": 0.6,
          "light": 0.5, "paper": 0.7, "bleed": 0.12, "noise": 0.6, "jpeg": 0.4}


def printed(ink: Image.Image, wear: Wear, rng: Generator) -> Image.Image:
    """Return the ink that reaches the paper, mode L, of the same size."""
    if not (wear.faint or wear.thermal):
        return ink
    ink_HW = np.asarray(ink, np.float32)
    if wear.faint:
        spots_HW = _cloud(ink_HW.shape, rng, 5)
        keep_HW = 1 - wear.faint * (0.25 + 0.75 * np.clip(1.4 * spots_HW, 0, 1))
        grain_HW = rng.random(ink_HW.shape, np.float32)
        ink_HW = ink_HW * np.where(grain_HW < 0.35 * wear.faint, 0.4 * keep_HW, keep_HW)
    if wear.thermal:
        ink_HW = ink_HW * _head(ink_HW.shape, wear.thermal, rng)
    return Image.fromarray(ink_HW.clip(0, 255).astype(np.uint8))


def _head(shape: tuple[int, int], strength: float, rng: Generator) -> np.ndarray:
    """Return what a thermal head of dots prints, float32[H, W]: 1 is all ink."""
    height, width = shape
    columns_W = np.ones(width, np.float32)
    dead = rng.integers(0, 1 + math.ceil(strength * width / 60))
    columns_W[rng.integers(0, width, dead)] = rng.uniform(0, 0.5)
    fading_W = _wave(width, rng) * 0.5 + 0.5
    columns_W *= 1 - 0.6 * strength * fading_W
    rows_H = np.ones(height, np.float32)
    if rng.random() < 0.6:  # dots show, 1.5 to 4 pixels apart
        apart = rng.uniform(1.5, 4)
        depth = 0.7 * strength
        columns_W *= 1 - depth * (np.arange(width, dtype=np.float32) / apart % 1 < 0.4)
        rows_H *= 1 - depth * (np.arange(height, dtype=np.float32) / apart % 1 < 0.4)
    return rows_H[:, None] * columns_W


def bent(ink: Image.Image, wear: Wear, rng: Generator, lines: int = 1) -> Image.Image:
    """Return `ink` of so many lines tilted, in perspective and crumpled, of the same size."""
    if not (wear.tilt or wear.crumple):
        return ink
    width, height = ink.size
    cells = max(1, math.ceil(width / _CELL))
    x = np.linspace(0, width, cells + 1)
    at = x / width - 0.5
    # A turn lifts one end: by up to a fifth of the line's height, so that letters stay in.
    turn = rng.uniform(-1, 1) * wear.tilt * min(0.2 * height, 0.05 * width)
    top, bottom = turn * at, height + turn * at
    squeeze = rng.uniform(-1, 1, 2) * wear.tilt * 0.1 * height
    top, bottom = top + squeeze[0] * at, bottom + squeeze[1] * at
    slant = rng.uniform(-1, 1) * wear.tilt * 0.25 * height  # of letters
    if wear.crumple:
        wave = np.cumsum(rng.uniform(-1, 1, (3, cells + 1)), axis=1)
        wave -= np.linspace(wave[:, 0], wave[:, -1], cells + 1, axis=1)
        wave = np.clip(wave, -1.5, 1.5) * wear.crumple * np.array([[0.09], [0.09], [0.1]])
        wave *= height / lines
        top, bottom, x = top + wave[0], bottom + wave[1], x + wave[2]
    edges = np.linspace(0, width, cells + 1).round().astype(int).tolist()
    upper, lower = (x + slant / 2).tolist(), (x - slant / 2).tolist()
    top, bottom = top.tolist(), bottom.tolist()
    mesh = [
        ((edges[i], 0, edges[i + 1], height),
         (upper[i], top[i], lower[i], bottom[i],
          lower[i + 1], bottom[i + 1], upper[i + 1], top[i + 1]))
        for i in range(cells)
    ]
    return ink.transform(ink.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def photographed(ink: Image.Image, wear: Wear, rng: Generator, lines: int = 1) -> Image.Image:
    """Return the picture of `ink` of so many lines on paper, grey, of the same size."""
    if wear.coarse:
        scale = 1 + 1.3 * wear.coarse
        small = max(1, round(ink.width / scale)), max(1, round(ink.height / scale))
        ink = ink.resize(small, Image.Resampling.BOX).resize(ink.size, Image.Resampling.BILINEAR)
    if wear.blur:
        along, across = wear.blur * rng.uniform(0.2, 1, 2) * ink.height / lines / 24
        ink = ink.filter(ImageFilter.BoxBlur((float(along), float(across))))
    ink_HW = np.asarray(ink, np.float32) / 255
    shape = ink_HW.shape
    paper = 1 - 0.5 * wear.paper * rng.random()
    # With the darkest paper, ink is told from it by a sixth of the range.
    contrast = paper * (1 - wear.paper * rng.uniform(0, 0.75))
    contrast *= rng.uniform(0.75, 1)
    if wear.bleed:
        other_HW = np.roll(ink_HW[::rng.choice((-1, 1)), ::-1], rng.integers(1, 9), axis=0)
        ink_HW = np.maximum(ink_HW, 0.45 * wear.bleed * other_HW)
    picture_HW = np.float32(paper) - np.float32(contrast) * ink_HW
    if wear.paper:
        fibres = 0.12 * wear.paper * rng.random()
        picture_HW += np.float32(fibres) * (_cloud(shape, rng, 6) - 0.5)
    if wear.light:
        picture_HW = picture_HW * _light(shape, wear.light, rng)
    if wear.noise:
        level = 0.1 * wear.noise * rng.uniform(0.3, 1)
        picture_HW = picture_HW + level * rng.standard_normal(shape, np.float32)
    picture_HW = (picture_HW * 255).clip(0, 255)
    if rng.random() < 0.08 * (wear.paper > 0):  # light on dark
        picture_HW = 255 - picture_HW
    picture = Image.fromarray(picture_HW.astype(np.uint8))
    if wear.jpeg:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(80 - 62 * wear.jpeg))
        picture = Image.open(file)
        picture.load()
    return picture


def _light(shape: tuple[int, int], strength: float, rng: Generator) -> np.ndarray:
    """Return the light on the paper, float32[H, W] around 1: a gradient, at times a shadow."""
    height, width = shape
    y_H1 = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    x_W = np.linspace(-0.5, 0.5, width, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.5, 0.5, 2) * strength
    light_HW = 1 - abs(slope_x) / 2 + slope_x * x_W + slope_y * 0.6 * y_H1
    if rng.random() < 0.3:
        edge, lean = rng.uniform(-0.5, 0.5), rng.uniform(-0.1, 0.1)
        soft = 0.5 + 0.5 * np.tanh((x_W - edge + lean * y_H1) * rng.uniform(8, 60))
        light_HW = light_HW * (1 - 0.5 * strength * soft)
    return np.asarray(light_HW, np.float32)


def _cloud(shape: tuple[int, int], rng: Generator, size: int) -> np.ndarray:
    """Return smooth spots of about `size` pixels, float32[H, W] from 0 to 1."""
    height, width = shape
    small = rng.integers(0, 256, (height // size + 2, width // size + 2), np.uint8)
    cloud = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(cloud, np.float32) / 255


def _wave(width: int, rng: Generator) -> np.ndarray:
    """Return a slow wave along a line, float32[W] from -1 to 1."""
    length, phase = rng.uniform(60, 600), rng.uniform(0, 2 * math.pi)
    return np.asarray(np.sin(np.arange(width) * (2 * math.pi / length) + phase), np.float32)
