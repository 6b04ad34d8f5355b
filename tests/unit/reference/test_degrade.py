"""Wear changes a picture as much as it is told to, never its size, and the same from one seed."""

import random
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cloister.errors import SettingError
from cloister.reference.degrade import Wear, bent, photographed, printed

EFFECTS = [field.name for field in fields(Wear)]


def ink(width: int = 200) -> Image.Image:
    image = Image.new("L", (width, 40))
    ImageDraw.Draw(image).text((4, 4), "Total 12.50", fill=255, font_size=26)
    return image


def worn(image: Image.Image, wear: Wear, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(photographed(bent(printed(image, wear, rng), wear, rng), wear, rng))


@pytest.mark.parametrize("effect", EFFECTS)
def test_an_effect_changes_the_picture_and_keeps_its_size(effect: str) -> None:
    plain = worn(ink(), Wear())
    pictures = [worn(ink(), Wear(**{effect: 1.0}), seed) for seed in range(5)]
    assert all(picture.shape == plain.shape for picture in pictures)
    assert all(picture.dtype == np.uint8 for picture in pictures)
    assert any(np.corrcoef(plain.ravel(), picture.ravel())[0, 1] < 0.999 for picture in pictures)


@pytest.mark.parametrize("width", [1, 9, 48, 49, 700])
def test_all_effects_at_once_keep_any_size(width: int) -> None:
    wear = Wear(**dict.fromkeys(EFFECTS, 1.0))
    for seed in range(5):
        assert worn(ink(width), wear, seed).shape == (40, width)


def test_without_wear_ink_stays_where_it_is() -> None:
    image, rng = ink(), np.random.default_rng(0)
    assert printed(image, Wear(), rng) is image
    assert bent(image, Wear(), rng) is image
    picture = np.asarray(photographed(image, Wear(), rng), np.float32)
    assert np.corrcoef(picture.ravel(), np.asarray(image).ravel())[0, 1] < -0.999


def test_the_same_seed_gives_the_same_picture() -> None:
    wear = Wear.drawn(random.Random(3), 1.0)
    assert np.array_equal(worn(ink(), wear, 1), worn(ink(), wear, 1))
    assert not np.array_equal(worn(ink(), wear, 1), worn(ink(), wear, 2))


def test_drawn_wear_is_as_strong_as_told() -> None:
    drawn = [Wear.drawn(random.Random(seed), 0.4) for seed in range(50)]
    values = [getattr(wear, effect) for wear in drawn for effect in EFFECTS]
    assert 0.3 < max(values) <= 0.4 and min(values) == 0
    assert Wear.drawn(random.Random(0), 0.0) == Wear()


def test_a_strength_out_of_bounds_is_refused() -> None:
    with pytest.raises(SettingError, match=r"blur is 1\.5"):
        Wear(blur=1.5)
