"""The ladder has the sizes that were promised, and impossible shapes are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cloister.errors import SettingError
from cloister.model.checkpoint import plan
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.model.transformer import Decoder
from cloister.tiers import Scale, Shape, Tier, ladder


def test_the_nano_tiers_have_the_published_sizes_and_a_thousandth_of_them() -> None:
    for tier, billions in ((Tier.NANO_1, 1.8), (Tier.NANO_2, 3.25)):
        assert ladder(Scale.FULL)[tier].parameters == pytest.approx(billions * 1e9, rel=0.01)
        assert ladder("reference")[tier].parameters == pytest.approx(billions * 1e6, rel=0.01)


@pytest.mark.parametrize("scale", Scale)
def test_each_tier_is_larger_than_the_next(scale: Scale) -> None:
    sizes = [ladder(scale)[tier].parameters for tier in Tier]
    assert sizes == sorted(sizes, reverse=True)
    assert [tier.four_bit for tier in Tier] == [False, False, True, True]


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("tier", Tier)
def test_the_numbers_are_those_of_the_decoder_itself(scale: Scale, tier: Tier) -> None:
    shape = ladder(scale)[tier]
    with torch.device("meta"):
        decoder = Decoder(ModelConfig(shape=shape))
    assert sum(parameter.numel() for parameter in decoder.parameters()) == shape.parameters

    untied = ModelConfig(shape=replace(shape, tied=False))
    recipe = Recipe.parse("8da4w-g32")
    held = 0
    for name, (kind, size) in plan(untied, recipe).items():
        bits = 8 * kind.itemsize
        if name.endswith(".q"):
            scheme = recipe.scheme_of(name.removesuffix(".q"))
            assert scheme is not None
            bits = scheme.bits
        held += torch.Size(size).numel() * bits // 8
    assert shape.weight_bytes() == pytest.approx(held, rel=1e-6)


def test_an_unknown_tier_or_scale_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingError, match="nano-1"):
        ladder()["femto"]
    with pytest.raises(SettingError, match="reference"):
        ladder("huge")


@pytest.mark.parametrize("change", [
    {"layers": 0}, {"heads": 3, "kv_heads": 2}, {"head_size": 33}, {"context": -1},
])
def test_an_impossible_shape_is_refused(change: dict[str, int]) -> None:
    good = ladder()["nano-1"]
    with pytest.raises(SettingError):
        replace(good, **change)
    assert isinstance(good, Shape)
