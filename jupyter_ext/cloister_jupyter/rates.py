"""Pass rates with their intervals, and the smallest tier that passes, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MOST", "Rate", "Verdict", "compared", "sign_test", "verdict", "wilson"]

MOST = 100_000  # cases more that are counted up to
_Z = 1.959964  # of a two-sided interval of 95 %


def wilson(hits: float, n: float, z: float = _Z) -> tuple[float, float]:
    """Return the interval of a share, 95 % unless `z` says otherwise (Wilson, 1927)."""
    if n <= 0:
        return 0.0, 1.0
    share, extra = hits / n, z * z / n
    middle = share + extra / 2
    half = z * math.sqrt(max(0.0, share * (1 - share)) / n + extra / (4 * n))
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How many of `n` cases passed.

    Raises:
        SettingError: more passed than there are.
    """

    passed: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.passed <= self.n:
            raise SettingError(f"{self.passed} of {self.n} cases passed; count again.")

    @property
    def value(self) -> float | None:
        """The share; None of no cases."""
        return self.passed / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share of all such cases lies, with 95 % confidence."""
        return wilson(self.passed, self.n)

    def passes(self, wanted: float) -> bool | None:
        """Tell whether the share is at least `wanted`; None where the interval holds it."""
        low, high = self.interval
        return True if low >= wanted else False if high < wanted else None

    def missing(self, wanted: float) -> int | None:
        """Return how many more cases that go alike would tell; None where MOST would not."""
        if self.passes(wanted) is not None or not self.n:
            return 0 if self.n else None
        share = self.passed / self.n

        def tells(n: int) -> bool:
            low, high = wilson(share * n, n)
            return low >= wanted or high < wanted

        low, high = self.n, self.n + MOST
        if not tells(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if tells(middle) else (middle, high)
        return high - self.n

    def __str__(self) -> str:
        if not self.n:
            return "no case"
        low, high = self.interval
        return (f"{self.passed} of {self.n} cases ({self.passed / self.n:.0%}, 95 % interval "
                f"{low:.0%} to {high:.0%})")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The smallest tier that passes, and whether the cases are enough to say so."""

    tier: str | None  # None: none does, or it cannot be told
    settled: bool  # no smaller one may pass as well
    text: str

    def __str__(self) -> str:
        return self.text


def verdict(rates: Mapping[str, Rate], wanted: float) -> Verdict:
    """Say which of the tiers, the smallest first, is the smallest with a share of `wanted`.

    A tier passes where the whole interval does, and fails where none of it does.

    Raises:
        SettingError: `wanted` is no share above 0 and below 1, or there is no tier.
    """
    if not 0 < wanted < 1:  # no number of cases shows that a share is 1
        raise SettingError(f"The wanted share is {wanted}; give one above 0 and below 1.")
    if not rates:
        raise SettingError("There is no tier to judge; run one first.")
    open_ = [name for name, rate in rates.items() if rate.passes(wanted) is None]
    passing = next((name for name, rate in rates.items() if rate.passes(wanted)), None)
    names = list(rates)
    if passing is None:
        if not open_:
            best = max(rates, key=lambda name: rates[name].value or 0.0)
            return Verdict(tier=None, settled=True, text=(
                f"No tier passes {wanted:.0%} of the cases; {best} comes closest with "
                f"{rates[best]}."))
        return Verdict(tier=None, settled=False, text=_untold(open_[0], rates, wanted))
    text = f"{passing} is the smallest tier that passes: {rates[passing]}; {wanted:.0%} is wanted."
    smaller = [name for name in open_ if names.index(name) < names.index(passing)]
    if smaller:
        text += f" Whether a smaller one does is open: {_untold(smaller[0], rates, wanted)}"
    return Verdict(tier=passing, settled=not smaller, text=text)


def sign_test(one: int, other: int) -> float:
    """Return how often chance splits so many at least as unevenly (McNemar's test, exact)."""
    n, term, tail = one + other, 1, 0
    for k in range(min(one, other) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def compared(before: str, after: str, broken: int, mended: int, n: int) -> str:
    """Say whether `after` is better than `before`, of `n` cases that both were judged on."""
    if not broken + mended:
        return f"{before} and {after} pass the same ones of {n:,} cases." if n else (
            f"No case was judged of both {before} and {after}; give cases a check.")
    chance = sign_test(broken, mended)
    percent = "under 0.1" if chance < 0.001 else f"{100 * chance:.2g}"
    told = f"{after} is {'worse' if broken > mended else 'better'}" if chance < 0.05 else (
        "too few to tell the two apart")
    return (f"Of {n:,} cases {after} breaks {broken:,} that {before} passes, and mends {mended:,}: "
            f"{told}. Chance alone splits {broken + mended:,} as unevenly in {percent} % of "
            "comparisons (exact McNemar test).")


def _untold(name: str, rates: Mapping[str, Rate], wanted: float) -> str:
    rate = rates[name]
    missing = rate.missing(wanted)
    more = (f"about {missing:,} more that go alike would tell" if missing else
            "it is too close to the bound for any number of cases" if rate.n else "run some first")
    return (f"Too few cases to tell of {name} whether it passes {wanted:.0%}: {rate}; {more}.")
