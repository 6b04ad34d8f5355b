"""Guesses are what they should be, cost what they should, and leave no text behind."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.runtime.core import Core, MediaPosition, Position
from cloister.runtime.draft import Guesser, Lookup, LowerTier
from cloister.runtime.program import FakeProgram

CONTEXT, CHUNK, VOCABULARY = 64, 8, 300


def lower() -> tuple[LowerTier, Core, FakeProgram]:
    program = FakeProgram(VOCABULARY, CONTEXT)
    core = Core(program, name="small", context=CONTEXT, chunk=CHUNK)
    return LowerTier(core, vocabulary=VOCABULARY), core, program


def guess(guesser: Guesser, positions: list[Position], most: int = 4) -> list[int] | None:
    return None if guesser.match(positions) is None else list(guesser.propose(most))


def test_what_followed_the_longest_and_latest_n_gram_is_guessed() -> None:
    text = [1, 2, 3, 4, 50, 9, 3, 4, 60, 9, 4, 70, 9, 8]
    assert guess(Lookup(), [*text, 1, 2, 3, 4], 2) == [50, 9]
    assert guess(Lookup(), [*text, 3, 4], 2) == [60, 9]  # the later one of two
    assert guess(Lookup(), [*text, 5, 4], 2) == [70, 9]
    assert guess(Lookup(), [*text, 5]) is None
    assert guess(Lookup(), [5]) is None


def test_a_longer_match_is_of_another_kind() -> None:
    text = list[Position](range(20))
    kinds = [Lookup().match([*text, 99, *text[3:3 + size]]) for size in (1, 2, 3, 4, 7, 8, 9)]
    assert kinds == [1, 2, 2, 4, 4, 8, 8]


def test_a_repetition_is_guessed_to_go_round() -> None:
    assert guess(Lookup(), [5, 6, 7, 5, 6, 7, 5], 7) == [6, 7, 5, 6, 7, 5, 6]
    assert guess(Lookup(), [5, 5], 3) == [5, 5, 5]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(1, 39))
@settings(deadline=None)
def test_a_text_that_grows_is_read_as_one_that_comes_at_once(ids: list[int], by: int) -> None:
    grown = Lookup()
    for end in range(1, len(ids), by):
        grown.match(ids[:end])
    assert guess(grown, list(ids)) == guess(Lookup(), list(ids))


def test_each_token_is_looked_at_once() -> None:
    class Counted(list[Position]):
        seen = 0

        def __getitem__(self, place: slice) -> list[Position]:  # type: ignore[override]
            found = super().__getitem__(place)
            self.seen += len(found)
            return found

    text, lookup = Counted(), Lookup()
    for id_ in range(500):
        text.append(id_ % 7)
        lookup.match(text)
    assert text.seen == 500


def test_a_picture_is_never_guessed() -> None:
    shown: list[Position] = [MediaPosition(bytes(32), place) for place in range(3)]
    assert guess(Lookup(), [1, 2, 3, *shown, 4, 1, 2], 4) == [3]
    assert guess(Lookup(), [1, 2, *shown, 4, 1, 2], 4) == []
    assert guess(Lookup(), [*shown, 4, *shown, 4], 4) == []


def test_no_text_is_in_what_a_guesser_shows() -> None:
    lookup = Lookup()
    lookup.match([12345, 12345])
    assert "12345" not in repr(lookup)


def greedy(text: list[int], count: int) -> list[int]:
    text = list(text)
    for _ in range(count):
        row = FakeProgram(VOCABULARY, CONTEXT).forward(torch.tensor([text]), 0)
        text.append(int(row.argmax()))
    return text[-count:]


def test_a_lower_tier_guesses_what_it_would_say_greedily() -> None:
    tier, _, program = lower()
    text = list(range(10, 16))
    assert guess(tier, list(text)) == greedy(text, 4)
    program.calls.clear()
    assert guess(tier, [*text, *greedy(text, 2), 7]) == greedy([*text, *greedy(text, 2), 7], 4)
    assert program.calls[0] == (len(text) + 2, 1)  # what was right of the guess is not read again


def test_nothing_is_guessed_behind_the_end_of_an_answer() -> None:
    assert guess(Lookup((7,)), [1, 2, 3, 7, 4, 5, 1, 2]) == [3, 7]
    assert guess(Lookup((7,)), [7, 4, 5, 7], 3) == [4, 5, 7]
    text = list(range(10, 16))
    said = greedy(text, 4)
    _, core, program = lower()
    tier = LowerTier(core, vocabulary=VOCABULARY, end=said[2:3])
    assert guess(tier, list(text)) == said[:3]
    assert len(program.calls) == 3  # nor read


def test_a_lower_tier_reads_a_long_text_a_call_at_a_time() -> None:
    tier, core, program = lower()
    text = list[Position](range(10, 31))
    tier.match(text)
    assert [tier.catch_up() for _ in range(3)] == [False, False, True]
    assert program.calls == [(0, 8), (8, 8), (16, 4)]
    assert core.cached == text[:-1]
    tier.propose(1)
    assert program.calls[-1] == (20, 1)


def test_a_lower_tier_reads_the_text_around_pictures() -> None:
    tier, _, _ = lower()
    shown: list[Position] = [MediaPosition(bytes(32), place) for place in range(3)]
    assert guess(tier, [5, *shown, 6, 7]) == greedy([5, 6, 7], 4)


def test_a_lower_tier_guesses_no_further_than_its_context_and_the_vocabulary() -> None:
    tier, _, _ = lower()
    assert guess(tier, [5] * CONTEXT) is None
    assert len(guess(tier, [5] * (CONTEXT - 1)) or ()) == 2  # the second is not read
    few = LowerTier(lower()[1], vocabulary=3)
    assert set(guess(few, [5, 6]) or ()) <= {0, 1, 2}
