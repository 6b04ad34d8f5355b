"""Blind comparison: names hidden, sides shuffled, votes counted.

Who votes looks at the result after every vote, and stops when it says something. An interval for a
number of votes that was fixed before is then too narrow: of two equal tiers it would name a better
one far more often than it says. The interval here holds at every look (Robbins, Annals of
Mathematical Statistics 41, 1970): a uniform mixture of bets against each win rate, of which none
wins twenty times its stake with more than 5 % chance, however long one plays (Ville, 1939).
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["LABELS", "MOST", "Cast", "Pair", "Result", "Vote", "interval", "result", "results",
           "schedule", "shuffled"]

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST = 100_000  # votes more that are counted up to
_ENOUGH = math.log(20)  # 1 / 5 %


class Vote(StrEnum):
    """What was said of two answers side by side."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BAD = "both bad"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two tiers to show for an item, by the side they are on. Its repr names neither."""

    item: int
    left: str = field(repr=False)
    right: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Cast:
    """A vote on a pair."""

    pair: Pair
    vote: Vote


def shuffled(names: Sequence[str], rng: random.Random) -> dict[str, str]:
    """Return which name each letter stands for, in an order that `rng` draws.

    Raises:
        SettingError: there are more names than letters, or one twice.
    """
    _check(names)
    return dict(zip(LABELS, rng.sample(names, len(names)), strict=False))


def schedule(names: Sequence[str], items: int, seed: int) -> list[Pair]:
    """Return every pair of names on each of the items, once, in an order and on sides at random.

    The same seed gives the same list; that one is not shown before the last vote.

    Raises:
        SettingError: there are fewer than two names, or one twice, or too many.
    """
    _check(names)
    if len(names) < 2:
        raise SettingError("A blind comparison needs two tiers at least; choose more.")
    rng = random.Random(f"votes {seed}")
    pairs = []
    for one, other in itertools.combinations(names, 2):
        # As often on the left as on the right: who always says left finds no better tier.
        sides = [number % 2 == 0 for number in range(items)]
        rng.shuffle(sides)
        pairs += [
            Pair(item=item, left=one if left else other, right=other if left else one)
            for item, left in enumerate(sides)]
    rng.shuffle(pairs)
    return pairs


@dataclass(frozen=True, kw_only=True)
class Result:
    """How often one tier was better than another, in the votes on the two."""

    one: str
    other: str
    wins: int  # of the first
    losses: int
    ties: int
    bad: int

    @property
    def votes(self) -> int:
        """All votes on the two."""
        return self.wins + self.losses + self.ties + self.bad

    @property
    def rate(self) -> float | None:
        """The share of wins among the votes that prefer one; None where none does."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else None

    @property
    def interval(self) -> tuple[float, float]:
        """Where that share lies, with 95 % confidence at every look."""
        return interval(self.wins, self.losses)

    @property
    def better(self) -> str | None:
        """Which of the two is better; None where it cannot be told yet."""
        if _evidence(self.wins, self.losses, 0.5) < _ENOUGH:  # an equal rate is in the interval
            return None
        return self.one if self.wins > self.losses else self.other

    @property
    def missing(self) -> int | None:
        """How many more votes like these would tell; None where MOST would not.

        Without a vote that prefers one: the fewest that could.
        """
        if self.better is not None:
            return 0
        decided = self.wins + self.losses
        share = self.wins / decided if decided else 1.0

        def tells(n: int) -> bool:
            return _evidence(share * n, (1 - share) * n, 0.5) >= _ENOUGH

        low, high = decided, decided + MOST
        if not tells(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if tells(middle) else (middle, high)
        # Of votes like these, some prefer none.
        return math.ceil((high - decided) * (self.votes / decided if decided else 1.0))

    def __str__(self) -> str:
        rest = f"{self.ties} ties, {self.bad} both bad"
        if self.rate is None:
            return (f"No vote prefers {self.one} or {self.other} ({rest}); at least "
                    f"{self.missing} that do would tell.")
        low, high = self.interval
        text = (f"{self.one} wins {self.rate:.0%} of {self.wins + self.losses} votes against "
                f"{self.other} (95 % interval {low:.0%} to {high:.0%}; {rest}): ")
        if self.better is not None:
            return text + f"{self.better} is better."
        if self.missing is None:
            return text + "too even, no number more like these would tell."
        return text + f"too few to tell; about {self.missing:,} more like these would."


def interval(wins: float, losses: float) -> tuple[float, float]:
    """Return the interval of a win rate, 95 %, that holds whenever one looks."""
    n = wins + losses
    if not n:
        return 0.0, 1.0

    def bound(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            if _evidence(wins, losses, middle) < _ENOUGH:
                inside = middle
            else:
                outside = middle
        return outside

    share = wins / n
    return (bound(share, 0.0) if wins else 0.0), (bound(share, 1.0) if losses else 1.0)


def result(votes: Iterable[Cast], one: str, other: str) -> Result:
    """Count the votes on two tiers."""
    counts = Counter(
        str(vote.vote) if vote.vote in (Vote.TIE, Vote.BAD) else
        vote.pair.left if vote.vote is Vote.LEFT else vote.pair.right
        for vote in votes if {vote.pair.left, vote.pair.right} == {one, other})
    return Result(one=one, other=other, wins=counts[one], losses=counts[other],
                  ties=counts[Vote.TIE], bad=counts[Vote.BAD])


def results(votes: Sequence[Cast], names: Sequence[str]) -> list[Result]:
    """Return the result of each two tiers of `names`, in their order."""
    return [result(votes, one, other) for one, other in itertools.combinations(names, 2)]


def _evidence(wins: float, losses: float, rate: float) -> float:
    """Return the logarithm of what the mixture has won against `rate`: log B(w+1, l+1) / p^w q^l.
    """
    mixture = math.lgamma(wins + 1) + math.lgamma(losses + 1) - math.lgamma(wins + losses + 2)
    for count, share in ((wins, rate), (losses, 1 - rate)):
        if count:
            mixture -= count * (math.log(share) if share > 0 else -math.inf)
    return mixture


def _check(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise SettingError("A tier is there twice; each can be compared with others only.")
    if len(names) > len(LABELS):
        raise SettingError(f"At most {len(LABELS)} tiers are compared; choose fewer.")
