"""A verdict says no more than the cases show."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import SettingError
from cloister_jupyter.rates import Rate, compared, sign_test, verdict, wilson


def test_the_interval_is_wilsons() -> None:
    # R: binom::binom.wilson(c(0, 15, 20), 20)
    for hits, low, high in ((0, 0.0, 0.1611252), (15, 0.5312, 0.8881), (20, 0.8388748, 1.0)):
        assert wilson(hits, 20) == pytest.approx((low, high), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_nineteen_of_twenty_intervals_hold_the_true_share() -> None:
    rng = random.Random(0)
    for share in (0.5, 0.8, 0.95):
        held = 0
        for _ in range(1000):
            low, high = wilson(sum(rng.random() < share for _ in range(60)), 60)
            held += low <= share <= high
        assert held >= 920


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.01, 0.99))
def test_the_cases_that_are_missing_are_just_enough(hits: int, n: int, wanted: float) -> None:
    rate = Rate(passed=min(hits, n), n=n)
    missing = rate.missing(wanted)
    low, high = rate.interval
    assert low <= rate.passed / n + 1e-9 and high >= rate.passed / n - 1e-9
    if missing:
        share, total = rate.passed / n, n + missing
        low, high = wilson(share * total, total)
        assert low >= wanted or high < wanted
        low, high = wilson(share * (total - 1), total - 1)
        assert low < wanted <= high


def rates(**counts: tuple[int, int]) -> dict[str, Rate]:
    return {name: Rate(passed=passed, n=n) for name, (passed, n) in counts.items()}


def test_the_smallest_tier_that_passes_is_named() -> None:
    said = verdict(rates(nano_1=(60, 100), nano_2=(99, 100), pro=(100, 100)), 0.9)
    assert (said.tier, said.settled) == ("nano_2", True)
    assert "nano_2 is the smallest tier that passes: 99 of 100 cases (99%" in str(said)


def test_too_few_cases_are_said_to_be_too_few() -> None:
    said = verdict(rates(nano_1=(10, 10), pro=(10, 10)), 0.9)
    assert (said.tier, said.settled) == (None, False)
    assert "Too few cases to tell of nano_1" in str(said) and "about 25 more" in str(said)
    said = verdict(rates(nano_1=(90, 100), pro=(99, 100)), 0.9)
    assert (said.tier, said.settled) == ("pro", False)
    assert "too close to the bound" in str(said)
    assert "run some first" in str(verdict(rates(pro=(0, 0)), 0.9))


def test_that_no_tier_passes_is_said_with_the_closest() -> None:
    said = verdict(rates(nano_1=(10, 100), pro=(50, 100)), 0.9)
    assert (said.tier, said.settled) == (None, True)
    assert "No tier passes 90%" in str(said) and "pro comes closest" in str(said)


@pytest.mark.parametrize("wanted", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_share_that_no_cases_can_show_is_refused(wanted: float) -> None:
    with pytest.raises(SettingError, match="above 0 and below 1"):
        verdict(rates(pro=(1, 1)), wanted)
    with pytest.raises(SettingError):
        verdict({}, 0.9)
    with pytest.raises(SettingError):
        Rate(passed=2, n=1)


@pytest.mark.parametrize(("one", "other", "chance"), [
    (0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (6, 0, 0.03125), (7, 0, 0.015625), (12, 3, 0.035156),
    (3, 12, 0.035156), (9000, 9300, 0.0271)])
def test_the_sign_test_is_the_binomial_one(one: int, other: int, chance: float) -> None:
    assert sign_test(one, other) == pytest.approx(chance, abs=1e-4)


def test_a_comparison_says_which_is_worse_or_that_it_cannot_be_told() -> None:
    assert "b is worse" in compared("a", "b", 12, 3, 200)
    assert "b is better" in compared("a", "b", 3, 12, 200)
    assert "too few to tell" in compared("a", "b", 3, 1, 200)
    assert "under 0.1 %" in compared("a", "b", 30, 0, 200)
    assert compared("a", "b", 0, 0, 200) == "a and b pass the same ones of 200 cases."
    assert "No case was judged" in compared("a", "b", 0, 0, 0)
