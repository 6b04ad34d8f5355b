"""Blind votes name a better tier only where there is one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import SettingError
from cloister_jupyter.rates import wilson
from cloister_jupyter.votes import (
    Cast,
    Pair,
    Result,
    Vote,
    interval,
    result,
    results,
    schedule,
    shuffled,
)

NAMES = ["nano-1", "nano-2", "pro"]


def counted(wins: int, losses: int, ties: int = 0, bad: int = 0) -> Result:
    return Result(one="a", other="b", wins=wins, losses=losses, ties=ties, bad=bad)


def test_names_are_hidden_and_both_order_and_sides_are_shuffled_by_the_seed() -> None:
    pairs = schedule(NAMES, 20, seed=3)
    assert pairs == schedule(NAMES, 20, seed=3) != schedule(NAMES, 20, seed=4)
    assert not any(name in repr(pairs) for name in NAMES)
    seen = Counter((each.item, frozenset((each.left, each.right))) for each in pairs)
    assert len(seen) == 60 and set(seen.values()) == {1}
    sides = Counter((each.left, each.right) for each in pairs)
    assert set(sides.values()) == {10} and len(sides) == 6
    assert [each.item for each in pairs] != sorted(each.item for each in pairs)
    orders = {tuple(shuffled(NAMES, random.Random(seed)).values()) for seed in range(50)}
    assert len(orders) == 6
    assert sorted(shuffled(NAMES, random.Random(1)).values()) == NAMES


def test_who_always_votes_left_finds_no_better_tier() -> None:
    votes = [Cast(pair=pair, vote=Vote.LEFT) for pair in schedule(NAMES, 100, seed=1)]
    for each in results(votes, NAMES):
        assert (each.wins, each.losses, each.better) == (50, 50, None)
        assert each.missing is None and "too even" in str(each)


@given(st.lists(st.sampled_from(list(Vote)), max_size=60), st.integers(0, 9))
def test_every_vote_is_counted_once_whatever_the_side(votes: list[Vote], seed: int) -> None:
    casts = [Cast(pair=pair, vote=vote) for pair, vote in zip(
        schedule(NAMES, 20, seed), votes, strict=False)]
    assert sum(each.votes for each in results(casts, NAMES)) == len(votes)
    swap = {Vote.LEFT: Vote.RIGHT, Vote.RIGHT: Vote.LEFT}
    mirrored = [
        Cast(pair=replace(each.pair, left=each.pair.right, right=each.pair.left),
             vote=swap.get(each.vote, each.vote)) for each in casts]
    assert results(casts, NAMES) == results(mirrored, NAMES)
    one, other = result(casts, "pro", "nano-1"), result(casts, "nano-1", "pro")
    assert (one.wins, one.losses) == (other.losses, other.wins)
    assert one.interval == pytest.approx(tuple(1 - x for x in reversed(other.interval)), abs=1e-6)


def looks_until_told(rng: random.Random, share: float, votes: int) -> tuple[bool, bool]:
    """Vote and look after each vote: whether this, and Wilson's interval, ever told a better one.
    """
    wins, ours, fixed = 0, False, False
    for n in range(1, votes + 1):
        wins += rng.random() < share
        ours = ours or counted(wins, n - wins).better is not None
        low, high = wilson(wins, n)
        fixed = fixed or not low <= 0.5 <= high
    return ours, fixed


def test_of_equal_tiers_a_better_one_is_rarely_named_however_often_one_looks() -> None:
    rng = random.Random(0)
    told = [looks_until_told(rng, 0.5, 150) for _ in range(400)]
    ours, fixed = (sum(column) / len(told) for column in zip(*told, strict=True))
    assert ours <= 0.05
    assert fixed > 0.2  # what an interval for a fixed number would do


def test_a_better_tier_is_found() -> None:
    rng = random.Random(0)
    assert sum(looks_until_told(rng, 0.8, 60)[0] for _ in range(100)) >= 90


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_interval_holds_the_rate_and_narrows(wins: int, losses: int) -> None:
    low, high = interval(wins, losses)
    assert 0 <= low <= high <= 1
    if wins + losses:
        assert low <= wins / (wins + losses) <= high
        wider = interval(wins / 2, losses / 2)
        assert wider[0] <= low + 1e-9 and high <= wider[1] + 1e-9


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 20))
def test_the_votes_that_are_missing_are_just_enough(wins: int, losses: int, ties: int) -> None:
    each = counted(wins, losses, ties)
    missing = each.missing
    if not missing or not wins + losses:
        return
    decided = wins + losses
    more = missing * decided / (decided + ties)
    share, n = wins / decided, decided + more
    low, high = interval(share * n, (1 - share) * n)
    assert low > 0.5 or high < 0.5 or n - decided < 1
    low, high = interval(share * (n - 2), (1 - share) * (n - 2))
    assert n - 2 <= decided or low <= 0.5 <= high


def test_the_result_is_said_in_words() -> None:
    assert "at least 8 that do would tell" in str(counted(0, 0, ties=2, bad=1))
    assert counted(8, 0).better == "a" and counted(7, 0).better is None
    assert "a wins 100% of 8 votes against b" in str(counted(8, 0))
    assert str(counted(0, 30)).endswith("b is better.")
    assert "too few to tell; about" in str(counted(6, 3, ties=3))
    assert (counted(6, 3, ties=9).missing or 0) > (counted(6, 3).missing or 0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(SettingError, match="two tiers"):
        schedule(["pro"], 3, 1)
    with pytest.raises(SettingError, match="twice"):
        schedule(["pro", "pro"], 3, 1)
    with pytest.raises(SettingError, match="fewer"):
        shuffled([str(n) for n in range(27)], random.Random(0))
    assert schedule(NAMES, 0, 1) == [] and result([], "a", "b").votes == 0
    assert repr(Pair(item=1, left="x", right="y")) == "Pair(item=1)"
