"""The token loop ends where it should, and gives the same tokens however they are arrived at."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import (
    AnswerIncomplete,
    ConstraintError,
    ContextExceeded,
    EmptyPrompt,
    UnsupportedMedia,
)
from cloister.runtime.chat import Sampling, Stats
from cloister.runtime.core import Core, MediaPosition, Position
from cloister.runtime.generate import Decoding, Drafter, generate, score
from cloister.runtime.program import FakeProgram
from cloister.runtime.sampling import Choice, Sampler

CONTEXT, CHUNK, VOCABULARY = 64, 8, 300
PROMPT = list(range(10, 31))
DRAWN = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=5)


@pytest.fixture
def program() -> FakeProgram:
    return FakeProgram(VOCABULARY, CONTEXT)


@pytest.fixture
def core(program: FakeProgram) -> Core:
    return Core(program, name="tiny", context=CONTEXT, chunk=CHUNK)


def fresh() -> Core:
    return Core(FakeProgram(VOCABULARY, CONTEXT), name="tiny", context=CONTEXT, chunk=CHUNK)


def decoding(sampling: Sampling | None = None, **options: Any) -> Decoding:
    return Decoding(sampler=Sampler(sampling or Sampling()), **options)


def ids(core: Core, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    stats = options.pop("stats", None)
    return [choice.id for choice in generate(core, prompt, decoding(**options), stats=stats)]


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens, each by a program that has read nothing."""
    found: list[int] = []
    for _ in range(count):
        tokens = torch.tensor([[*prompt, *found]])
        found.append(int(FakeProgram(VOCABULARY, CONTEXT).forward(tokens, 0).argmax()))
    return found


def test_tokens_are_the_likeliest_ones_with_their_log_probabilities(core: Core) -> None:
    choices = list(generate(core, PROMPT, decoding(limit=9, top=2)))
    assert [choice.id for choice in choices] == greedy(PROMPT, 9)
    row = FakeProgram(VOCABULARY, CONTEXT).forward(torch.tensor([PROMPT]), 0)[0].log_softmax(-1)
    assert choices[0].logprob == pytest.approx(float(row.max()))
    assert [id_ for id_, _ in choices[0].top] == row.topk(2).indices.tolist()


def test_an_answer_ends_at_its_limit(core: Core) -> None:
    stats = Stats()
    assert len(ids(core, limit=5, stats=stats)) == 5
    assert (stats.finish, stats.tokens) == ("length", 5)


def test_an_answer_ends_where_the_context_is_full(core: Core) -> None:
    stats = Stats()
    assert len(ids(core, stats=stats)) == CONTEXT - len(PROMPT)
    assert stats.finish == "context"


def test_a_prompt_that_fills_the_context_but_for_one_gets_one_token(core: Core) -> None:
    stats = Stats()
    assert len(ids(core, [5] * (CONTEXT - 1), stats=stats)) == 1
    assert stats.finish == "context"
    with pytest.raises(ContextExceeded):
        ids(core, [5] * (CONTEXT + 1))


def test_an_answer_ends_with_its_end_token_which_is_given_too(core: Core) -> None:
    wanted = greedy(PROMPT, 6)
    assert len(set(wanted)) == 6
    stats = Stats()
    assert ids(core, end=(wanted[5], 299), stats=stats) == wanted
    assert (stats.finish, stats.tokens) == ("end", 6)


def test_an_empty_prompt_and_a_picture_are_refused_and_the_engine_is_let_go(core: Core) -> None:
    with pytest.raises(EmptyPrompt):
        ids(core, [])
    shown: list[Position] = [1, MediaPosition(bytes(32), 0)]
    with pytest.raises(UnsupportedMedia):
        list(generate(core, shown, decoding()))
    assert ids(core, limit=3) == greedy(PROMPT, 3)


@pytest.mark.parametrize("calls", range(6))
def test_a_stop_ends_between_two_calls_of_the_program(
    core: Core, program: FakeProgram, calls: int
) -> None:
    """The first three calls read the prompt."""
    stats = Stats()
    got = list(generate(
        core, PROMPT, decoding(), stats=stats, stopped=lambda: len(program.calls) >= calls))
    assert len(program.calls) == calls
    assert [choice.id for choice in got] == greedy(PROMPT, max(0, calls - 2))
    assert stats.finish == "stop"
    assert core.cached == [*PROMPT, *greedy(PROMPT, 3)][:min(8 * calls, 18 + calls)]


def test_what_is_cached_of_a_prompt_is_not_read_again(core: Core, program: FakeProgram) -> None:
    core.extend(PROMPT[:12])
    program.calls.clear()
    ids(core, limit=1)
    assert program.calls == [(12, 8), (20, 1)]


def test_statistics_tell_what_the_answer_took(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    stats = Stats(prompt_tokens=21)
    ids(core, limit=4, stats=stats)
    assert stats.tokens == 4
    assert stats.ttft_s == 1  # the second reading of the clock, after the first
    assert stats.decode_s == 3
    assert stats.decode_tokens_per_s == 1
    assert Stats(tokens=1, decode_s=0.0).decode_tokens_per_s is None


class Draft:
    """Proposes what `guess` makes of what was read so far."""

    def __init__(self, guess: Callable[[Sequence[Position]], Sequence[int]]) -> None:
        self.guess = guess
        self.proposed = self.read = self.right = 0

    def propose(
        self, positions: Sequence[Position], room: int, forced: Sequence[int] = ()
    ) -> Sequence[int]:
        draft = self.guess(positions)
        self.proposed += min(room, len(draft))
        return draft

    def took(self, drafted: int, seconds: float) -> None:
        self.read += drafted
        assert seconds > 0

    def judged(self, *, right: bool) -> None:
        self.right += right


def drafters(answer: Sequence[int]) -> dict[str, Drafter]:
    rng = random.Random(1)

    def right(positions: Sequence[Position]) -> Sequence[int]:
        at = len(positions) - len(PROMPT)
        return answer[at:at + 5]

    def partly(positions: Sequence[Position]) -> Sequence[int]:
        draft = list(right(positions))
        if draft:
            draft[rng.randrange(len(draft))] ^= 1
        return draft

    return {
        "right": Draft(right), "wrong": Draft(lambda positions: [1, 2, 3]),
        "partly right": Draft(partly), "empty": Draft(lambda positions: []),
        "now and then": Draft(lambda positions: right(positions) if rng.random() < 0.5 else []),
        "longer than the context": Draft(lambda positions: [*right(positions), *[7] * 100]),
    }


@pytest.mark.parametrize("kind", list(drafters([])))
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("limit", [1, 7, None])
def test_a_drafter_changes_no_token_whatever_it_proposes(
    kind: str, sampling: Sampling, limit: int | None
) -> None:
    plain, stats = Stats(), Stats()
    answer = ids(fresh(), sampling=sampling, limit=limit, stats=plain)
    core = fresh()
    drafter = drafters(answer)[kind]
    assert ids(core, sampling=sampling, limit=limit, drafter=drafter, stats=stats) == answer
    assert (stats.finish, stats.tokens) == (plain.finish, plain.tokens)
    end = answer[-1]
    assert ids(core, sampling=sampling, limit=limit, drafter=drafter, end=(end,)) == (
        answer[:answer.index(end) + 1])
    assert ids(core, sampling=sampling, limit=limit) == answer  # nothing wrong stays cached


@given(
    seed=st.integers(0, 2**32), drawn=st.booleans(), limit=st.one_of(st.none(), st.integers(1, 43)),
    forced=st.integers(0, 9), constrained=st.booleans(), right=st.floats(0, 1),
    longest=st.integers(0, 70), top=st.sampled_from([0, 3]), stop=st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_whatever_is_guessed_the_answer_is_the_same_in_all_that_is_told_of_it(
    seed: int, drawn: bool, limit: int | None, forced: int, constrained: bool, right: float,
    longest: int, top: int, stop: int
) -> None:
    rng, sampling = random.Random(seed), DRAWN if drawn else Sampling()
    begun = [2 * rng.randrange(VOCABULARY // 2) for _ in range(forced)][:limit]

    def answered(drafter: Draft | None, end: Sequence[int] = ()) -> tuple[list[Choice], Stats]:
        stats, found = Stats(), list[Choice]()
        constraint = Digits(30, end=298) if constrained else None
        with suppress(AnswerIncomplete):
            for choice in generate(core, PROMPT, decoding(
                sampling, limit=limit, forced=begun, constraint=constraint, drafter=drafter,
                top=top, end=end,
            ), stats=stats, stopped=lambda: stats.tokens > stop):
                found.append(choice)
        return found, stats

    def guess(positions: Sequence[Position]) -> list[int]:
        said = [choice.id for choice in plain]
        at, count = len(positions) - len(PROMPT), rng.randint(0, longest)
        wanted = [*said[at:], *rng.choices(range(VOCABULARY), k=99)][:count]
        return [id_ if rng.random() < right else rng.randrange(VOCABULARY) for id_ in wanted]

    core = fresh()
    plain, before = answered(None)
    end = [choice.id for choice in plain[-1:] if rng.random() < 0.5]
    plain, before = answered(None, [*end, 298])
    drafter = Draft(guess)
    found, stats = answered(drafter, [*end, 298])
    assert found == plain
    assert (stats.tokens, stats.finish, stats.forced_tokens) == (
        before.tokens, before.finish, before.forced_tokens)
    assert stats.drafted_tokens == drafter.read <= drafter.proposed
    assert stats.accepted_tokens == drafter.right <= stats.drafted_tokens
    assert answered(None, [*end, 298])[0] == plain  # nothing wrong stays cached


def test_what_a_constraint_forbids_of_a_draft_is_not_read(
    core: Core, program: FakeProgram
) -> None:
    list(itertools.islice(generate(core, PROMPT, decoding(
        constraint=Digits(9), drafter=Draft(lambda positions: [8, 6, 7, 4]))), 2))
    assert program.calls[-1] == (len(PROMPT), 3)  # the first token, and 8 and 6 behind it


def test_a_drafter_is_told_what_a_constraint_forces(core: Core) -> None:
    told = list[Sequence[int]]()

    class Told(Draft):
        def propose(
            self, positions: Sequence[Position], room: int, forced: Sequence[int] = ()
        ) -> Sequence[int]:
            told.append(forced)
            return ()

    ids(core, constraint=Digits(3, end=7), end=(7,), drafter=Told(lambda positions: ()))
    assert told == [(), (), [7]]


def test_right_drafts_save_calls_of_the_program(core: Core, program: FakeProgram) -> None:
    answer = ids(fresh(), limit=24)
    program.calls.clear()
    ids(core, limit=24, drafter=drafters(answer)["right"])
    assert len(program.calls) <= 2 + 24 / 6 + 1


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("count", [1, 6, 7, 8, 9, 20, 43])
def test_a_forced_beginning_that_would_have_come_anyway_changes_nothing(
    sampling: Sampling, count: int
) -> None:
    def told(**options: Any) -> tuple[list[Choice], Stats]:
        stats = Stats()
        found = list(generate(fresh(), PROMPT, decoding(sampling, top=5, **options), stats=stats))
        return found, stats

    free, plain = told()
    bound, stats = told(forced=tuple(choice.id for choice in free[:count]))
    assert bound == free
    assert (stats.tokens, stats.finish, stats.forced_tokens) == (
        plain.tokens, plain.finish, count)


def test_another_beginning_is_gone_on_from_and_counted_apart(core: Core) -> None:
    stats, wanted = Stats(), greedy([*PROMPT, 5, 6], 3)
    assert ids(core, forced=(5, 6), limit=5, stats=stats) == [5, 6, *wanted]
    assert (stats.tokens, stats.forced_tokens) == (5, 2)
    assert stats.decode_tokens_per_s == 2 / stats.decode_s
    assert ids(core, forced=(5, 6), limit=2, stats=(scored := Stats())) == [5, 6]
    assert (scored.finish, scored.ttft_s, scored.decode_tokens_per_s) == ("length", 0, None)


def test_a_forced_answer_is_told_how_likely_each_of_its_tokens_was(core: Core) -> None:
    forced = [299, *range(40, 60)]
    rows = torch.cat(list(score(fresh(), [*PROMPT, *forced], len(PROMPT) - 1)))[:-1]
    found = list(generate(core, PROMPT, decoding(top=5, forced=forced, limit=len(forced))))
    assert [choice.id for choice in found] == forced
    for choice, row in zip(found, rows, strict=True):
        assert choice.logprob == float(row.log_softmax(-1)[choice.id])
        assert [id_ for id_, _ in choice.top] == row.topk(5).indices.tolist()
        assert choice.rank == 1 + row.argsort(descending=True).tolist().index(choice.id)


def test_a_forced_answer_ends_at_its_end_token_at_the_contexts_end_and_when_stopped(
    core: Core
) -> None:
    stats = Stats()
    assert ids(core, forced=(5, 6, 7), end=(6,), stats=stats) == [5, 6]
    assert stats.finish == "end"
    room = CONTEXT - len(PROMPT)
    assert ids(core, forced=[5] * 99, stats=stats) == [5] * room
    assert stats.finish == "context"
    stats = Stats()
    list(generate(
        core, PROMPT, decoding(forced=[5] * 40), stopped=lambda: stats.tokens > 9, stats=stats))
    assert (stats.tokens, stats.finish) == (10, "stop")


class Digits:
    """Even ids alone, and nothing after some of them."""

    def __init__(self, most: int, end: int | None = None) -> None:
        self.most, self.end, self.accepted = most, end, list[int]()

    @property
    def finished(self) -> bool:
        return len(self.accepted) == self.most and self.end is None

    def allowed(self) -> torch.Tensor:
        if len(self.accepted) == self.most:
            return torch.arange(VOCABULARY) == (-1 if self.end is None else self.end)
        return torch.arange(VOCABULARY) % 2 == 0

    def permits(self, id_: int) -> bool:
        return bool(self.allowed()[id_])

    def permitted(self, ids: Sequence[int]) -> int:
        after = copy(self)
        after.accepted = list(self.accepted)
        for number, id_ in enumerate(ids):
            if not after.permits(id_):
                return number
            after.accepted.append(id_)
        return len(ids)

    def forced(self) -> Sequence[int]:
        return [self.end] if self.end is not None and len(self.accepted) == self.most else ()

    def accept(self, id_: int) -> None:
        assert id_ % 2 == 0
        self.accepted.append(id_)


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("drafted", [False, True])
def test_a_constraint_leaves_only_what_it_allows(sampling: Sampling, drafted: bool) -> None:
    constraint, stats = Digits(6), Stats()
    drafter = drafters(greedy(PROMPT, 9))["partly right"] if drafted else None
    got = list(generate(
        fresh(), PROMPT, decoding(sampling, constraint=constraint, drafter=drafter), stats=stats))
    assert [choice.id for choice in got] == constraint.accepted
    assert len(got) == 6
    assert stats.finish == "end"
    plain = Digits(6)
    list(generate(fresh(), PROMPT, decoding(sampling, constraint=plain)))
    assert plain.accepted == constraint.accepted


def test_a_constraint_may_ask_for_the_end_token(core: Core) -> None:
    constraint, stats = Digits(3, end=7), Stats()
    got = ids(core, constraint=constraint, end=(7,), stats=stats)
    assert got == [*constraint.accepted, 7]
    assert stats.finish == "end"


def test_log_probabilities_under_a_constraint_are_the_models_own(core: Core) -> None:
    def first(**options: Any) -> Choice:
        return next(generate(fresh(), PROMPT, decoding(top=300, **options)))

    free, bound = first(), first(constraint=Digits(3))
    assert bound.top == free.top
    assert bound.logprob == dict(free.top)[bound.id]


def test_a_forced_beginning_that_a_constraint_does_not_allow_is_refused(core: Core) -> None:
    found = ids(core, constraint=Digits(4), forced=(8, 6))
    assert found[:2] == [8, 6] and len(found) == 4
    with pytest.raises(ConstraintError, match="leave one of them out"):
        ids(core, constraint=Digits(4), forced=(8, 7))


@pytest.mark.parametrize(("options", "finish"), [({"limit": 4}, "length"), ({}, "context")])
def test_an_answer_cut_off_before_its_constraint_is_met_says_so_after_its_last_token(
    core: Core, options: dict[str, int], finish: str
) -> None:
    stats, got = Stats(), []
    with pytest.raises(AnswerIncomplete, match="allow more tokens"):
        for choice in generate(
            core, PROMPT, decoding(constraint=Digits(99), **options), stats=stats
        ):
            got.append(choice.id)
    assert len(got) == options.get("limit", CONTEXT - len(PROMPT))
    assert stats.finish == finish
    list(generate(core, PROMPT, decoding(constraint=Digits(4), limit=4)))  # just in time
    stopped = Stats()
    list(generate(core, PROMPT, decoding(constraint=Digits(99)), stats=stopped,
                  stopped=lambda: stopped.tokens == 3))
    assert stopped.finish == "stop"


@pytest.mark.parametrize("first", [0, 1, 7, 8, 9, 20])
def test_scores_are_those_of_reading_token_by_token(
    core: Core, program: FakeProgram, first: int
) -> None:
    one = fresh()
    wanted = [one.extend(PROMPT[:end])[-1] for end in range(first + 1, len(PROMPT) + 1)]
    parts = list(score(core, PROMPT, first))
    assert torch.equal(torch.cat(parts), torch.stack(wanted))
    assert core.cached == PROMPT


def test_scoring_reads_nothing_twice_that_it_need_not(core: Core, program: FakeProgram) -> None:
    def read() -> list[tuple[int, int]]:
        calls = list(program.calls)
        program.calls.clear()
        return calls

    list(score(core, PROMPT, 12))
    assert read() == [(0, 8), (8, 8), (16, 5)]
    list(score(core, PROMPT, 12))  # the context before the first is still there
    assert read() == [(12, 8), (20, 1)]
    list(score(core, [*PROMPT[:12], 99, 98], 11))  # as for another choice after one question
    assert read() == [(11, 3)]
    list(score(core, [*PROMPT[:12], 97], 11))
    assert read() == [(11, 2)]
    core.extend(PROMPT)
    assert sum(length for _, length in read()) == len(PROMPT) - 12
    core.extend([*PROMPT, 5])
    assert read() == [(21, 1)]


def test_scoring_refuses_what_reading_refuses(core: Core) -> None:
    with pytest.raises(ContextExceeded):
        list(score(core, [5] * (CONTEXT + 1), 60))
    assert torch.cat(list(score(core, [5] * CONTEXT, 60))).shape == (4, VOCABULARY)
