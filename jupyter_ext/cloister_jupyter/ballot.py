"""What is voted on, a pair of answers after the other, and what may be shown of it before the end.

Two equal answers are not shown: nobody can prefer one, and a vote on them would tell nothing. They
are counted apart, neither as ties nor among the votes that are missing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import SettingError
from cloister_jupyter.votes import Cast, Pair, Vote, result, results, schedule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cloister_jupyter.votes import Result

__all__ = ["MOST_PAIRS", "Ballot", "Mark"]

MOST_PAIRS = 10_000


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A vote as it is kept; without one, the last is taken back, or the names were shown.

    Its repr names no tier.
    """

    item: int = 0
    left: str = ""
    right: str = ""
    vote: Vote | None = None
    revealed: bool = False

    def __repr__(self) -> str:
        return "Mark()"


class Ballot:
    """Pairs of answers of some tiers to some items, and the votes on them.

    Raises:
        SettingError: there are more than MOST_PAIRS; or see `cloister_jupyter.votes.schedule`.
    """

    def __init__(self, names: Sequence[str], items: int, seed: int) -> None:
        if math.comb(len(names), 2) * items > MOST_PAIRS:
            raise SettingError(
                f"A vote has {MOST_PAIRS:,} pairs at most and this one more; take fewer prompts.")
        self.names, self.votes = tuple(names), list[Cast]()
        self.revealed = False  # the names were shown; from then on no vote is blind
        self._schedule, self._texts = schedule(names, items, seed), dict[tuple[str, int], str]()

    def __repr__(self) -> str:
        return f"Ballot({len(self.votes)} votes)"

    def fill(self, texts: Mapping[tuple[str, int], str]) -> None:
        """Take the answers by tier and item; of pairs that lack one, nothing is asked."""
        self._texts = {key: text.strip() for key, text in texts.items()}

    def replay(self, marks: Sequence[Mark]) -> None:
        """Take up votes that were kept."""
        for mark in marks:
            if mark.vote is not None:
                pair = Pair(item=mark.item, left=mark.left, right=mark.right)
                self.votes.append(Cast(pair=pair, vote=mark.vote))
            elif mark.revealed:
                self.revealed = True
            elif self.votes:
                self.votes.pop()

    @property
    def pairs(self) -> list[Pair]:
        """All pairs with two answers that differ, in order."""
        return [pair for pair in self._schedule if self._differ(pair)]

    @property
    def same(self) -> int:
        """The number of pairs whose answers are equal."""
        return sum(self._differ(pair) is False for pair in self._schedule)

    @property
    def lacking(self) -> int:
        """The number of pairs of which an answer is not there."""
        return sum(self._differ(pair) is None for pair in self._schedule)

    @property
    def next(self) -> Pair | None:
        """The pair to show; None when all are voted on."""
        voted = {each.pair for each in self.votes}
        return next((pair for pair in self.pairs if pair not in voted), None)

    def answers(self, pair: Pair) -> tuple[str, str]:
        """Return the two answers, the left one first."""
        return self._texts[pair.left, pair.item], self._texts[pair.right, pair.item]

    def vote(self, number: int, vote: Vote) -> Mark:
        """Vote on the pair that is shown, as the vote of that number, from 0; return what to keep.

        Raises:
            SettingError: another pair is shown by now, or none; or the names are.
        """
        self._check_blind()
        pair = self.next
        if pair is None or number != len(self.votes):
            raise SettingError("That pair is not shown any more; vote on the one that is.")
        self.votes.append(Cast(pair=pair, vote=vote))
        return Mark(item=pair.item, left=pair.left, right=pair.right, vote=vote)

    def undo(self) -> Mark:
        """Take the last vote back; its pair is shown again. Return what to keep.

        Raises:
            SettingError: there is no vote; or the names are shown.
        """
        self._check_blind()
        if not self.votes:
            raise SettingError("There is no vote to take back; vote first.")
        self.votes.pop()
        return Mark()

    def reveal(self) -> Mark:
        """Let the names be shown, and end the vote. Return what to keep."""
        self.revealed = True
        return Mark(revealed=True)

    def standing(self) -> list[str]:
        """Say of each two tiers, without naming them, how far the votes tell them apart."""
        found = sorted(results(self.votes, self.names), key=lambda each: (-each.votes, str(
            sorted((each.wins, each.losses)))))  # in an order that names do not decide
        return [_blind(each) for each in found]

    def outcome(self) -> list[str]:
        """Say of each two tiers which is better, or how many votes are missing, by name."""
        same = Counter(frozenset((pair.left, pair.right)) for pair in self._schedule
                       if self._differ(pair) is False)
        return [
            f"{result(self.votes, each.one, each.other)} Equal answers, which were not shown: "
            f"{same[frozenset((each.one, each.other))]}."
            for each in results(self.votes, self.names)]

    def _check_blind(self) -> None:
        if self.revealed:
            raise SettingError("The names are shown, so the vote is over; begin another.")

    def _differ(self, pair: Pair) -> bool | None:
        left, right = (self._texts.get((name, pair.item)) for name in (pair.left, pair.right))
        return None if left is None or right is None else left != right


def _blind(found: Result) -> str:
    wins, losses = max(found.wins, found.losses), min(found.wins, found.losses)
    ahead = replace(found, one="", other="", wins=wins, losses=losses)
    rest = f"{found.ties} ties, {found.bad} both bad"
    if ahead.rate is None:
        return f"No vote prefers one yet ({rest}); at least {ahead.missing} that do would tell."
    low, high = ahead.interval
    text = (f"{ahead.rate:.0%} of {wins + losses} votes prefer the same one (95 % interval "
            f"{low:.0%} to {high:.0%}; {rest}): ")
    if ahead.missing == 0:
        return text + "enough to tell which is better."
    if ahead.missing is None:
        return text + "too even, no number more like these would tell."
    return text + f"about {ahead.missing:,} more like these would tell."
