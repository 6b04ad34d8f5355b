"""The engine says truly what its buffers hold, whatever happens, and serves one at a time."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from tests.unit.runtime.conftest import FakeEngine

from cloister.errors import ContextExceeded, EmptyPrompt, EngineBusy, UnsupportedMedia
from cloister.runtime.chat import Sampling
from cloister.runtime.core import Core, MediaPosition, Position, Rows, encoded
from cloister.runtime.generate import Decoding, generate
from cloister.runtime.program import FakeProgram
from cloister.runtime.sampling import Sampler
from cloister.runtime.session import Session

CONTEXT, CHUNK = 64, 8
IDS = list(range(10, 40))


class Failure(Exception):
    """Of the program."""


@pytest.fixture
def program() -> FakeProgram:
    return FakeProgram(300, CONTEXT)


@pytest.fixture
def core(program: FakeProgram) -> Core:
    return Core(program, name="tiny", context=CONTEXT, chunk=CHUNK)


def alone(ids: list[int]) -> torch.Tensor:
    """Logits after each of `ids`, read at once by a program that has read nothing."""
    return FakeProgram(300, CONTEXT).score(torch.tensor([ids]), 0)[0]


def test_a_text_is_read_in_chunks_and_gives_the_last_logits(
    core: Core, program: FakeProgram
) -> None:
    assert torch.equal(core.extend(IDS), alone(IDS)[-1:])
    assert program.calls == [(0, 8), (8, 8), (16, 8), (24, 6)]
    assert core.cached == IDS


def test_all_rows_are_those_of_the_positions_that_are_new(
    core: Core, program: FakeProgram
) -> None:
    core.extend(IDS[:11])
    program.calls.clear()
    rows = core.extend(IDS, Rows.ALL)
    assert torch.equal(rows, alone(IDS)[11:])
    assert program.calls == [(11, 8), (19, 8), (27, 3)]


@pytest.mark.parametrize("rows", Rows)
def test_the_last_position_is_read_again_where_all_are_cached(
    core: Core, program: FakeProgram, rows: Rows
) -> None:
    core.extend(IDS)
    for shorter in (IDS, IDS[:20]):
        program.calls.clear()
        assert torch.equal(core.extend(shorter, rows), alone(shorter)[-1:])
        assert program.calls == [(len(shorter) - 1, 1)]
        assert core.cached == shorter


def test_another_text_is_read_from_where_the_two_part(core: Core, program: FakeProgram) -> None:
    core.extend(IDS)
    other = [*IDS[:12], *range(200, 210)]
    assert core.common(other) == 12
    program.calls.clear()
    assert torch.equal(core.extend(other), alone(other)[-1:])
    assert program.calls[0] == (12, 8)
    assert core.cached == other
    assert [core.common(ids) for ids in ([], [1], other[:5], [*other, 1])] == [0, 0, 5, len(other)]


def test_what_is_truncated_is_read_again(core: Core, program: FakeProgram) -> None:
    core.extend(IDS)
    core.truncate(100)
    assert core.cached == IDS
    core.truncate(9)
    assert core.cached == IDS[:9]
    program.calls.clear()
    core.extend(IDS[:10])
    assert program.calls == [(9, 1)]
    core.truncate(0)
    assert core.cached == []


def test_what_cached_gives_is_a_copy(core: Core) -> None:
    core.extend(IDS)
    core.cached.clear()
    assert core.cached == IDS


def test_any_sequence_of_calls_gives_what_one_reading_gives(core: Core) -> None:
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.choice((5, 6)) for _ in range(rng.randint(1, CONTEXT))]
        if rng.random() < 0.3:
            core.truncate(rng.randint(0, CONTEXT))
        if core.cached and rng.random() < 0.6:
            ids = [*core.cached[:rng.randint(0, len(core.cached))], *ids][:CONTEXT]
        start = min(core.common(ids), len(ids) - 1)
        if rng.random() < 0.5:
            assert torch.equal(core.extend(ids, Rows.ALL), alone(ids)[start:])
        else:
            assert torch.equal(core.extend(ids), alone(ids)[-1:])
        assert core.cached == ids


def test_nothing_to_read_and_too_much_are_refused_and_nothing_changes(
    core: Core, program: FakeProgram
) -> None:
    core.extend(IDS)
    program.calls.clear()
    with pytest.raises(EmptyPrompt):
        core.extend([])
    with pytest.raises(ContextExceeded, match=r"65 tokens .* 64"):
        core.extend([1] * 65)
    with pytest.raises(ContextExceeded):
        core.mark_cached([1] * 65)
    assert (core.cached, program.calls) == (IDS, [])
    core.extend([1] * 64)


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_failure_in_the_middle_leaves_what_was_read_before_it(
    engine: FakeEngine, error: type[BaseException], call: int
) -> None:
    engine.extend(IDS[:8])
    other = [*IDS[:4], *range(100, 120)]
    calls = iter(range(10))

    def fail() -> None:
        if next(calls) == call:
            raise error

    engine.program.before = fail
    with pytest.raises(error):
        engine.extend(other)
    assert engine.cached == other[:4 + 8 * call]
    engine.program.before = lambda: None
    assert torch.equal(engine.extend(other), alone(other)[-1:])


def test_buffers_are_live_and_what_was_written_through_them_is_marked(core: Core) -> None:
    core.extend(IDS)
    rows = [row.clone() for row in core.buffers(0, len(IDS))]
    other = Core(FakeProgram(300, CONTEXT), name="tiny", context=CONTEXT, chunk=CHUNK)
    for target, row in zip(other.buffers(0, len(IDS)), rows, strict=True):
        target.copy_(row)
    other.mark_cached(IDS)
    assert other.cached == IDS
    assert torch.equal(other.extend([*IDS, 7]), core.extend([*IDS, 7]))


def test_names_of_positions_are_never_the_beginning_of_another() -> None:
    digests = [bytes(32), b"\xff" * 32, bytes(31) + b"\1"]
    positions: list[Position] = [
        0, 1, 256, 2**32 - 2,
        *(MediaPosition(digest, place) for digest in digests for place in (0, 1, 256)),
    ]
    names = list(map(encoded, positions))
    for number, name in enumerate(names):
        assert not any(
            other.startswith(name) for place, other in enumerate(names) if place != number)


def test_a_media_position_is_its_digest_and_place_whatever_the_vector_is() -> None:
    one = MediaPosition(bytes(32), 3, torch.zeros(9, 4), 2)
    assert one == MediaPosition(bytes(32), 3)
    assert hash(one) == hash(MediaPosition(bytes(32), 3))
    assert one != MediaPosition(bytes(32), 4)
    assert one != MediaPosition(b"\1" * 32, 3)
    assert "tensor" not in repr(one)


def test_a_program_that_reads_text_only_refuses_a_picture_by_name(
    core: Core, program: FakeProgram
) -> None:
    shown = [*IDS[:10], MediaPosition(bytes(32), 0, torch.zeros(1, 4))]
    with pytest.raises(UnsupportedMedia, match="tiny reads text only"):
        core.extend(shown)
    assert core.cached == IDS[:10]  # the text before it
    assert torch.equal(core.extend(IDS), alone(IDS)[-1:])


def test_a_second_thread_is_refused_while_the_first_is_reading(engine: FakeEngine) -> None:
    began, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        assert go_on.wait(20)

    engine.program.before = wait
    thread = threading.Thread(target=engine.extend, args=(IDS[:8],))
    thread.start()
    assert began.wait(20)
    for refused in (
        lambda: engine.extend([1]), lambda: engine.truncate(0), lambda: engine.claim(object()),
        lambda: engine.exclusive().__enter__(),
    ):
        with pytest.raises(EngineBusy, match=r"tiny\.cloister is being used by another thread"):
            refused()
    go_on.set()
    thread.join()
    assert engine.cached == IDS[:8]
    engine.truncate(0)


def decoding() -> Decoding:
    return Decoding(sampler=Sampler(Sampling()))


def test_a_second_unfinished_stream_is_refused_until_the_first_ends(core: Core) -> None:
    one, two = generate(core, IDS, decoding()), generate(core, IDS[:3], decoding())
    first = [next(one).id, next(one).id]
    with pytest.raises(EngineBusy, match="tiny is giving another answer"):
        next(two)
    first += [next(one).id, next(one).id]
    one.close()
    three = generate(core, IDS[:3], decoding())
    next(three)
    del three  # dropped, it lets go as well
    four = generate(core, IDS, decoding())
    assert [next(four).id for _ in range(4)] == first


def test_a_claim_is_its_owners_alone(core: Core) -> None:
    one, two = object(), object()
    assert core.claim(one)
    assert not core.claim(one)
    core.release(two)  # has nothing to release
    with pytest.raises(EngineBusy):
        core.claim(two)
    core.release(one)
    assert core.claim(two)


def test_answers_from_many_threads_are_their_own_or_refused(engine: FakeEngine) -> None:
    """As a web server asks; see also `test_client`, where they wait for each other."""
    prompts = [f"what is {n} and {n}" for n in range(4)]

    def ask(prompt: str) -> list[int]:
        return [token.id for token in Session(engine).stream(prompt, max_tokens=5)]

    wanted, wrong, refused = {prompt: ask(prompt) for prompt in prompts}, list[str](), list[int]()

    def serve(prompt: str) -> None:
        for _ in range(20):
            try:
                if ask(prompt) != wanted[prompt]:
                    wrong.append(prompt)
            except EngineBusy:
                refused.append(1)

    threads = [threading.Thread(target=serve, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {prompt: ask(prompt) for prompt in prompts} == wanted  # and nothing stays claimed
