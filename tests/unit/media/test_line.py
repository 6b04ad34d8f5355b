"""A picture of a line of text becomes dark ink on white of one height, whatever light it was in."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from cloister.media.line import line


def written(ground: int, ink: int, width: int = 200) -> Image.Image:
    image = Image.new("L", (width, 32), ground)
    ImageDraw.Draw(image).text((4, 4), "Total 12.50", fill=ink, font_size=22)
    return image


@pytest.mark.parametrize(("size", "width"), [
    ((100, 32), 100), ((100, 64), 50), ((9000, 32), 512), ((1, 500), 16), ((5, 1), 160)])
def test_any_picture_has_the_height_and_at_most_the_width(
    size: tuple[int, int], width: int
) -> None:
    assert line(Image.new("RGB", size, "white"), 32, 512).size == (width, 32)


@pytest.mark.parametrize(("ground", "ink"), [(255, 0), (120, 90), (90, 120), (0, 255)])
def test_ink_becomes_black_on_white_at_any_contrast_and_polarity(ground: int, ink: int) -> None:
    pixels = np.asarray(line(written(ground, ink), 32, 512)).astype(int)
    expected = np.asarray(written(255, 0)).astype(int)
    assert np.abs(pixels - expected).max() <= 16  # rounding of 30 levels to 255


def test_a_shadow_over_half_of_a_line_does_not_turn_it_over() -> None:
    light = np.where(np.arange(200) < 130, 0.3, 1.0)
    shaded = Image.fromarray((np.asarray(written(255, 60)) * light).astype(np.uint8))
    for picture in (shaded, ImageOps.invert(shaded)):
        pixels = np.asarray(line(picture, 32, 512)).astype(float)
        ink = np.asarray(written(0, 255)) > 128
        for half in (slice(0, 120), slice(140, 200)):
            if ink[:, half].any():
                assert pixels[:, half][ink[:, half]].mean() < pixels[:, half][~ink[:, half]].mean()
