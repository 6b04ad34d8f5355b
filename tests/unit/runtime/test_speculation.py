"""As much is guessed as pays by the clock, and what does not pay is hardly tried."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from cloister.runtime.core import Position
from cloister.runtime.speculation import MOST, Estimates, Speculation

Cost = Callable[[int], float]


class Machine:
    """A model, a guesser and a clock: each call of a guess of so many tokens takes its time."""

    def __init__(self, step: Cost, draft: Cost, acceptance: float) -> None:
        self.step, self.draft, self.acceptance = step, draft, acceptance
        self.ready_s = 0.0  # what a guesser takes to read what it needs
        self.now_s, self.tokens, self.lengths = 0.0, 0, list[int]()
        self.estimates = Estimates(lambda: self.now_s)
        self.rng = random.Random(0)
        self.speculation = Speculation([self], self.estimates)

    def match(self, positions: Sequence[Position]) -> int | None:
        return 3

    def catch_up(self) -> bool:
        self.now_s += self.ready_s
        return True

    def propose(self, most: int) -> list[int]:
        self.now_s += self.draft(most)
        return [1] * most

    def run(self, tokens: int, forced: Sequence[int] = ()) -> float:
        """Make so many tokens more; tokens a second of the time it took."""
        began_s, first = self.now_s, self.tokens
        while self.tokens < first + tokens:
            count = len(self.speculation.propose([], 99, forced))
            self.lengths.append(count)
            self.now_s += self.step(count)
            self.speculation.took(count, self.step(count))
            self.tokens += 1
            for _ in range(count):
                right = self.rng.random() < self.acceptance
                self.speculation.judged(right=right)
                if not right:
                    break
                self.tokens += 1
        return (self.tokens - first) / (self.now_s - began_s)


def best(step: Cost, draft: Cost, acceptance: float) -> float:
    """Tokens a second of the best length that there is."""
    return max(
        sum(acceptance**power for power in range(count + 1)) / (
            step(count) + (draft(count) if count else 0))
        for count in range(MOST + 1))


STEPS: dict[str, Cost] = {
    "a fifth a token": lambda count: 1 + 0.2 * count,
    "as much a token": lambda count: 1.0 + count,
    "free up to four": lambda count: 1.0 if count < 4 else 2.5 + 0.3 * count,
    "in steps of four": lambda count: 1 + 0.5 * ((count + 3) // 4),
}
DRAFTS: dict[str, Cost] = {
    "nothing": lambda count: 0.0, "a third a token": lambda count: 0.33 * count}


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("draft", list(DRAFTS))
@pytest.mark.parametrize("step", list(STEPS))
def test_speed_is_near_that_of_the_best_length(step: str, draft: str, acceptance: float) -> None:
    machine = Machine(STEPS[step], DRAFTS[draft], acceptance)
    machine.run(1500)
    assert machine.run(3000) > 0.9 * best(STEPS[step], DRAFTS[draft], acceptance)


@pytest.mark.parametrize("step", ["a fifth a token", "as much a token", "in steps of four"])
@pytest.mark.parametrize("draft", list(DRAFTS))
def test_guesses_that_are_wrong_cost_two_percent_at_most(step: str, draft: str) -> None:
    machine = Machine(STEPS[step], DRAFTS[draft], 0.0)
    machine.run(100)
    assert machine.run(2000) > 0.98


def test_what_begins_to_pay_is_found_and_what_no_longer_does_is_dropped() -> None:
    machine = Machine(STEPS["a fifth a token"], DRAFTS["nothing"], 0.0)
    machine.run(2000)
    machine.acceptance = 0.95
    machine.run(3000)
    assert machine.run(500) > 2
    machine.acceptance = 0.0
    machine.run(200)
    assert machine.run(1000) > 0.97


def test_guesses_that_take_long_to_make_ready_are_dropped() -> None:
    """Those of a lower tier, which reads the prompt for an answer of a few tokens."""
    machine = Machine(STEPS["a fifth a token"], DRAFTS["nothing"], 0.95)
    machine.run(500)
    assert machine.lengths[-1] > 0
    machine.ready_s = 20.0
    machine.run(500)
    assert machine.run(1000) > 0.97
    machine.ready_s = 0.0
    machine.run(3000)
    assert machine.run(500) > 2


def test_guesses_that_bring_no_tokens_are_dropped() -> None:
    """Such as those behind the end of an answer, which nobody compares with a token."""
    machine = Machine(lambda count: 1 + 0.2 * count, lambda count: 0.3 * count, 1.0)
    machine.speculation.judged = lambda **_: None  # type: ignore[method-assign]
    calls = 2000
    for _ in range(calls):
        machine.run(1)
    assert machine.now_s < 1.05 * calls


def test_a_machine_that_slows_plain_steps_is_noticed() -> None:
    """Where all is guessed, a plain step is made now and then to know what it takes."""
    machine = Machine(lambda count: 1 + 0.2 * count, lambda count: 0.8 * count, 1.0)
    machine.step = lambda count: 3 + 0.2 * count  # guessing pays
    machine.run(500)
    assert machine.lengths[-1] > 0
    machine.step = lambda count: 0.5 + 0.2 * count  # no more
    machine.run(2000)
    assert sum(count > 0 for count in machine.lengths[-200:]) < 10


def test_the_first_step_is_plain_and_the_first_guesses_are_short() -> None:
    machine = Machine(STEPS["a fifth a token"], DRAFTS["nothing"], 1.0)
    machine.run(40)
    assert machine.lengths[:5] == [0, 1, 1, 3, 7]  # the first guess loads a method: not timed


def test_the_time_of_loading_a_method_is_not_held_against_guesses() -> None:
    calls = iter([1.0, 500.0])
    machine = Machine(lambda count: next(calls, 1 + 0.1 * count), DRAFTS["nothing"], 1.0)
    machine.run(2)
    machine.step = STEPS["a fifth a token"]
    machine.run(500)
    assert machine.run(100) > 3


def test_what_a_constraint_forces_is_guessed_where_that_pays_more() -> None:
    machine = Machine(STEPS["a fifth a token"], DRAFTS["a third a token"], 0.3)
    machine.run(300)
    assert machine.speculation.propose([], 99, [7, 8, 9]) == [7, 8, 9]
    for _ in range(200):  # the model spells it otherwise
        machine.speculation.judged(right=False)
    machine.acceptance = 0.95
    machine.run(1000)
    assert list(machine.speculation.propose([], 99, [7, 8, 9])) not in ([7], [7, 8], [7, 8, 9])


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    machine = Machine(STEPS["a fifth a token"], DRAFTS["nothing"], 1.0)
    machine.run(300)
    assert [len(machine.speculation.propose([], room)) for room in (0, 1, 2)] == [0, 1, 2]
