"""How many tokens to guess: as many as make the most tokens a second, none where that is plain.

Running estimates by the clock, of an engine; they hold no text, and no token depends on them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloister.runtime.core import Position
    from cloister.runtime.draft import Guesser

__all__ = ["FORCED", "MOST", "Estimates", "Speculation"]

MOST = 15  # tokens of a guess
FORCED = -1  # the kind of guess that a constraint makes

_RECENT = 7  # calls of a length, of which the lower quartile counts: the others were disturbed
_PLAIN_EVERY = 32  # guesses, after which two plain steps show what those take now
_MEMORY = 0.98  # a guess counts so much less with each later one of its kind
_HITS, _TRIES = 1.5, 2.0  # of a kind before it was tried
_ENOUGH = 4  # guesses of a kind, after which it counts what they brought
_SHARE = 0.01  # of the time, which may be lost by trying again what did not pay


class _Curve:
    """Seconds of a call by its number of guessed tokens, on lines between those that were timed."""

    def __init__(self) -> None:
        self.seconds = [0.0] * (MOST + 1)
        self.longest = -1  # that was timed
        self._recent = dict[int, deque[float]]()

    def add(self, count: int, seconds: float) -> None:
        recent = self._recent.setdefault(count, deque(maxlen=_RECENT))
        recent.append(seconds)
        usual = sorted(recent)[len(recent) // 4]
        if usual == self.seconds[count] and count <= self.longest:
            return
        self.seconds[count], self.longest = usual, max(count, self.longest)
        known = sorted(self._recent)
        for low, high in pairwise([*known, MOST]):
            first = self.seconds[low]  # beyond the longest the same, so that it is tried
            last = self.seconds[high] if high in self._recent else first
            for at in range(low + 1, high + (high not in self._recent)):
                self.seconds[at] = first + (last - first) * (at - low) / (high - low)


class _Brought:
    """What guesses of a kind brought, all that they took included; earlier ones count less."""

    def __init__(self) -> None:
        self.tokens = self._seconds = 0.0
        self._calls = 0

    @property
    def rate(self) -> float:
        """Tokens a second; infinite as long as there were few."""
        return self.tokens / self._seconds if self._calls >= _ENOUGH else math.inf

    def call(self, seconds: float) -> None:
        self._calls += 1
        self.tokens = self.tokens * _MEMORY + 1  # what follows the last right guess
        self._seconds = self._seconds * _MEMORY + seconds


class Estimates:
    """What is known of an engine's calls, and of the guesses for it by their kinds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Take times from `clock`, in seconds."""
        self.clock = clock
        self.steps = _Curve()
        self._drafts, self._hits = dict[int, _Curve](), dict[int, float]()
        self._tries = dict[int, float]()
        self._brought = dict[int, _Brought]()
        self._debt_s = 0.0  # lost by trials, and not yet a small share of the time
        self._loaded = False
        self._guesses = 0  # since the last plain step, or one less than none after one

    @property
    def plain_s(self) -> float | None:
        """Seconds of a plain step; None where one is to be made, so that they are known."""
        known = self.steps.longest >= 0 and 0 <= self._guesses <= _PLAIN_EVERY
        return self.steps.seconds[0] if known else None

    @property
    def in_debt(self) -> bool:
        """Whether trials have lost too much to make another."""
        return self._debt_s > 0

    def acceptance(self, kind: int) -> float:
        """Share of the guesses of a kind that are right where all before them are."""
        return self._hits.get(kind, _HITS) / self._tries.get(kind, _TRIES)

    def best(self, kind: int, room: int) -> tuple[int, float]:
        """Return the best number of tokens to guess, at most `room`, and its tokens a second."""
        steps, drafts = self.steps, self._drafts_of(kind).seconds
        acceptance, count, best, expected, power = self.acceptance(kind), 0, 0.0, 1.0, 1.0
        most = self._brought[kind].rate if kind in self._brought else math.inf
        # Lengths that were never tried are, beginning with short ones.
        for length in range(1, min(room, MOST, 2 * steps.longest + 1) + 1):
            power *= acceptance
            expected += power
            rate = expected / (steps.seconds[length] + drafts[length])
            if rate > best:
                count, best = length, rate
        return count, min(best, most)

    def took(
        self, kind: int, drafted: int, draft_s: float, step_s: float, *, trial: bool,
        ready_s: float = 0.0
    ) -> None:
        """Note the times of a guess, and of the call that verified it: 0 tokens, a plain step.

        Before the guess some time went by to make it ready.
        """
        if drafted:
            self._guesses += 1
        else:  # the first after guesses finds other data in the caches than the next
            self._guesses = -1 if self._guesses > _PLAIN_EVERY else 0
        if trial:
            self.lost(draft_s + step_s - self.steps.seconds[0])
        else:
            self.lost(-_SHARE * step_s)
        if drafted and not self._loaded:  # the first of them loads the method
            self._loaded = True
            return
        if drafted:  # a call that was disturbed counts as one that takes twice as long as most
            usual = self.steps.seconds[drafted] if drafted <= self.steps.longest else step_s
            self._brought.setdefault(kind, _Brought()).call(
                ready_s + draft_s + min(step_s, 2 * usual))
            self._drafts_of(kind).add(drafted, draft_s)
        self.steps.add(drafted, step_s)

    def judged(self, kind: int, *, right: bool) -> None:
        """Note whether a guessed token was right, where all before it were."""
        self._hits[kind] = self._hits.get(kind, _HITS) * _MEMORY + right
        self._tries[kind] = self._tries.get(kind, _TRIES) * _MEMORY + 1
        if right and kind in self._brought:
            self._brought[kind].tokens += 1

    def lost(self, seconds: float) -> None:
        """Note what a trial lost, or won back."""
        self._debt_s = max(0.0, self._debt_s + seconds)

    def _drafts_of(self, kind: int) -> _Curve:
        if kind not in self._drafts:
            self._drafts[kind] = _Curve()
            self._drafts[kind].add(0, 0.0)
        return self._drafts[kind]


class Speculation:
    """The guesses of one answer (see `cloister.runtime.generate.Drafter`)."""

    def __init__(self, guessers: Sequence[Guesser], estimates: Estimates) -> None:
        """Guess by that of `guessers` which pays best by `estimates`, where one does."""
        self._guessers, self._estimates = guessers, estimates
        self._kind, self._trial, self._ready_s, self._draft_s = 0, False, 0.0, 0.0

    def propose(
        self, positions: Sequence[Position], room: int, forced: Sequence[int] = ()
    ) -> Sequence[int]:
        """Guess at most `room` tokens; `forced` is how those that must come may be spelled.

        What does not seem to pay is tried now and then all the same, since that may change.
        """
        estimates, plain_s = self._estimates, self._estimates.plain_s
        self._ready_s, self._draft_s, self._trial = 0.0, 0.0, False
        if plain_s is None:
            return ()
        guesser, (count, rate), self._kind = None, (0, 0.0), FORCED
        if forced:
            count, rate = estimates.best(FORCED, min(room, len(forced)))
        for each in self._guessers:
            kind = each.match(positions)
            if kind is not None and (found := estimates.best(kind, room))[1] > rate:
                guesser, (count, rate), self._kind = each, found, kind
        self._trial = rate * plain_s <= 1
        if not count or (self._trial and estimates.in_debt):
            return ()
        return forced[:count] if guesser is None else self._guess(guesser, count)

    def _guess(self, guesser: Guesser, count: int) -> Sequence[int]:
        estimates, began_s = self._estimates, self._estimates.clock()
        ready = guesser.catch_up()
        ready_s = estimates.clock()
        self._ready_s = ready_s - began_s
        if self._trial:
            estimates.lost(self._ready_s)
        draft = guesser.propose(count) if ready else ()
        self._draft_s = estimates.clock() - ready_s
        return draft

    def took(self, drafted: int, seconds: float) -> None:
        """Note the time of the call that verified so many guessed tokens."""
        self._estimates.took(
            self._kind, drafted, self._draft_s, seconds, trial=self._trial and drafted > 0,
            ready_s=self._ready_s)

    def judged(self, *, right: bool) -> None:
        """Note whether the next guessed token was right."""
        self._estimates.judged(self._kind, right=right)
        if right and self._trial and (plain_s := self._estimates.plain_s) is not None:
            self._estimates.lost(-plain_s)
