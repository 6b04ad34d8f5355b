"""A kept conversation goes on where it stopped, and what was read is not read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.conftest import make_bundle

from cloister.bundle import Bundle
from cloister.errors import NotEnoughDisk, SessionMismatch, SettingError
from cloister.runtime import prefix
from cloister.runtime.chat import Sampling
from cloister.runtime.conversation import forget
from cloister.runtime.engine import Engine
from cloister.runtime.prefix import Precision, PrefixCache
from cloister.runtime.program import FakeProgram
from cloister.runtime.responses import ResponseCache
from cloister.runtime.session import Session
from cloister.vault.keys import Keyholder
from cloister.vault.namespace import Kind, Namespace
from cloister.vault.retention import Retention
from cloister.vault.store import Vault

BLOCK = 4


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "BLOCK", BLOCK)


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Namespace]:
    with Vault.create(tmp_path / "vault", Keyholder(keyfile=tmp_path / "key")) as vault:
        yield vault.namespace()


@pytest.fixture
def fresh(bundle: Bundle) -> Callable[[], Engine]:
    """Makes an engine that has read nothing, as a new process would; `program` is its fake."""

    def make(path: Path = bundle.path) -> Engine:
        program = FakeProgram(300, 64, prefer=tuple(range(70, 90)))
        engine = Engine(
            path, load=lambda *_, **__: program, runs_here=lambda backend: True)
        engine.program = program  # type: ignore[attr-defined]
        return engine

    return make


def read(engine: Engine) -> int:
    """Positions that were read since the last time."""
    count = sum(length for _, length in engine.program.calls)  # type: ignore[attr-defined]
    engine.program.calls.clear()  # type: ignore[attr-defined]
    return count


def session(engine: Engine, space: Namespace, name: str = "work", system: str | None = "call"):
    return Session(engine, name=name, system=system, prefixes=PrefixCache(engine, space))


def ask(session: Session, prompt: str, n: int = 6) -> list[tuple[int, float]]:
    return [(t.id, t.logprob) for t in session.stream(prompt, max_tokens=n)]


def test_a_conversation_goes_on_after_a_restart_as_if_there_had_been_none(fresh, space) -> None:
    unbroken = Session(fresh(), system="call")
    expected = [ask(unbroken, "the fox"), ask(unbroken, "the dog"), ask(unbroken, "jumps")]

    first = session(fresh(), space)
    assert [ask(first, "the fox"), ask(first, "the dog")] == expected[:2]
    length = len(first.engine.held)
    engine = fresh()
    second = session(engine, space, system=None)
    assert second.messages == first.messages
    assert second.conversation.restored == length
    assert ask(second, "jumps") == expected[2]
    assert read(engine) < length
    assert "fox" not in repr(second) + repr(second.conversation)


def test_sessions_of_a_namespace_share_what_they_begin_with(fresh, space) -> None:
    engine = fresh()
    alone = Session(engine, system="the quick brown fox", prefixes=PrefixCache(engine, space))
    expected = ask(alone, "the dog")
    whole = read(engine)
    other = fresh()
    shared = Session(other, system="the quick brown fox", prefixes=PrefixCache(other, space))
    assert ask(shared, "the dog") == expected
    assert shared.stats.restored_tokens > 0
    assert shared.stats.restored_tokens % BLOCK == 0
    assert read(other) == whole - shared.stats.restored_tokens


def test_another_namespace_shares_nothing(fresh, space) -> None:
    engine = fresh()
    ask(Session(engine, prefixes=PrefixCache(engine, space)), "the quick brown fox")
    other = fresh()
    apart = Session(other, prefixes=PrefixCache(other, space.vault.namespace("other")))
    ask(apart, "the quick brown fox")
    assert apart.stats.restored_tokens == 0


def test_where_texts_part_only_what_they_share_is_put_back(fresh, space) -> None:
    engine = fresh()
    cache = PrefixCache(engine, space)
    ids = list(range(4, 40))
    engine.logits(ids)
    cache.keep()
    for shared in (0, 3, 4, 11, 12, 35):
        other = fresh()
        changed = [*ids[:shared], *(id_ + 100 for id_ in ids[shared:])]
        assert PrefixCache(other, space).fetch(changed) == shared // BLOCK * BLOCK
        assert torch.equal(other.logits(changed), fresh().logits(changed))


def test_the_last_token_is_always_read_for_its_logits(fresh, space) -> None:
    engine = fresh()
    ids = list(range(4, 12))  # two whole blocks
    expected = engine.logits(ids)
    PrefixCache(engine, space).keep()
    other = fresh()
    assert PrefixCache(other, space).fetch(ids) == BLOCK
    assert torch.equal(other.logits(ids), expected)


def test_nothing_is_put_back_over_what_the_engine_holds_already(fresh, space) -> None:
    engine = fresh()
    ids = list(range(4, 40))
    engine.logits(ids)
    PrefixCache(engine, space).keep()
    other = fresh()
    other.logits(ids[:30])
    assert PrefixCache(other, space).fetch(ids[:32]) == 0
    assert PrefixCache(other, space).fetch(ids) == 32 - 30
    assert torch.equal(other.logits(ids), fresh().logits(ids))


@pytest.mark.parametrize("lost", ["first", "last", "state"])
def test_what_is_damaged_is_read_again(fresh, space, lost: str) -> None:
    first = session(fresh(), space)
    ask(first, "the quick brown fox")
    unbroken = Session(fresh(), system="call")
    ask(unbroken, "the quick brown fox")
    expected = ask(unbroken, "the dog")
    names = first.conversation._prefixes.names(b"work")
    name = {"first": names[0], "last": names[-2], "state": names[-1]}[lost]
    tag = space._tag(Kind.PREFIX, name)
    (file,), = space.vault.db.rows("SELECT file FROM objects WHERE tag = ?", tag)
    path = space.vault.directory / "segments" / file
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    second = session(fresh(), space)
    assert ask(second, "the dog") == expected
    third = session(fresh(), space)  # and is whole again
    assert third.conversation.restored == len(second.engine.held)


def test_another_bundle_or_system_prompt_is_refused_and_nothing_is_lost(
    fresh, space, tmp_path: Path, tokenizer_dir: Path
) -> None:
    ask(session(fresh(), space), "the fox")
    other = make_bundle(tmp_path / "other.cloister", tokenizer_dir, recipe="8da8w")
    with pytest.raises(SessionMismatch, match="bundle"):
        session(fresh(other.path), space)
    with pytest.raises(SessionMismatch, match="system"):
        session(fresh(), space, system="intent")
    with pytest.raises(SettingError, match="prefixes"):
        Session(fresh(), name="work")
    assert len(session(fresh(), space).messages) == 3


@pytest.mark.parametrize("name", ["", "x" * 257])
def test_a_session_name_out_of_bounds_is_refused_without_it(fresh, space, name: str) -> None:
    with pytest.raises(SettingError) as caught:
        session(fresh(), space, name=name)
    assert "xx" not in str(caught.value)
    ask(session(fresh(), space, name="na\u00efve \ud800 \n/.."), "any other will do")


def test_what_is_forgotten_leaves_no_state_behind(fresh, space) -> None:
    one = session(fresh(), space)
    ask(one, "the quick brown fox")
    ask(one, "jumps over")
    two = session(fresh(), space, name="other")
    ask(two, "hello")
    assert forget(space, "work")
    assert not forget(space, "work")
    assert session(fresh(), space).messages == session(fresh(), space, name="new").messages
    assert session(fresh(), space, name="other").messages == two.messages
    assert forget(space, "other")
    assert space.sizes() == {}
    assert not list((space.vault.directory / "segments").iterdir())


def test_what_another_process_said_or_forgot_is_not_written_over(fresh, space) -> None:
    first = session(fresh(), space)
    ask(first, "the quick brown fox")
    second = session(fresh(), space)
    ask(second, "jumps over")
    before = first.messages
    with pytest.raises(SessionMismatch, match="Another process"):
        ask(first, "the dog")
    assert first.messages == before
    assert session(fresh(), space).messages == second.messages
    assert forget(space, "work")
    with pytest.raises(SessionMismatch, match="Another process"):
        ask(second, "the dog")
    assert space.sizes() == {}
    one, two = session(fresh(), space, name="new"), session(fresh(), space, name="new", system="x")
    ask(one, "hello")
    with pytest.raises(SessionMismatch):
        ask(two, "hello")


def test_what_is_forgotten_while_its_state_is_kept_leaves_none(
    fresh, space, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = PrefixCache.keep

    def late(cache: PrefixCache, name: bytes) -> None:
        forget(space, "work")
        keep(cache, name)

    monkeypatch.setattr(PrefixCache, "keep", late)
    ask(session(fresh(), space), "the quick brown fox")
    assert space.sizes() == {}


def test_a_full_disk_costs_the_cache_and_not_the_conversation(
    fresh, space, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise NotEnoughDisk("full")

    engine = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(Namespace, "put_large", full)
        patch.setattr(Namespace, "put", full)
        talk = Session(engine, name="work", prefixes=PrefixCache(engine, space),
                       responses=ResponseCache(space, engine.model_id))
        assert len(ask(talk, "the quick brown fox")) == 6
    assert session(fresh(), space, system=None).messages == talk.messages


def test_an_answer_that_was_damaged_is_made_again(fresh, space) -> None:
    engine = fresh()

    def answer() -> tuple[list[tuple[int, float]], int]:
        read(engine)
        return ask(Session(engine, responses=ResponseCache(space, engine.model_id)), "the fox"), \
            read(engine)

    first, work = answer()
    assert work
    assert answer() == (first, 0)
    space.vault.db.rows("UPDATE records SET sealed = substr(sealed, 1, 60)")
    assert answer()[0] == first
    assert answer() == (first, 0)


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(fresh, space) -> None:
    first = session(fresh(), space)
    stream = first.stream("the fox", max_tokens=20)
    for _ in range(3):
        next(stream)
    stream.close()
    again = session(fresh(), space)
    assert again.messages == first.messages
    assert again.messages[-1].role == "assistant"


def test_the_cache_keeps_within_its_bounds(fresh, space) -> None:
    engine = fresh()
    cache = PrefixCache(engine, space, retention=Retention(most_bytes=3 * 4 * BLOCK))
    engine.logits(list(range(4, 60)))
    cache.keep()
    count, size = space.sizes()[Kind.PREFIX]
    assert (count, size) == (3, 3 * 4 * BLOCK)


def test_eight_bits_come_close_at_a_quarter_of_the_size(fresh, space) -> None:
    engine = fresh()
    rows = [torch.randn(60, 2, 32, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    cache = PrefixCache(engine, space, precision=Precision.EIGHT_BITS)
    data = b"".join(cache._packed(rows))
    assert len(data) < 0.29 * sum(4 * row.numel() for row in rows)
    back = [torch.zeros_like(row) for row in rows]
    cache._unpack(memoryview(bytearray(data)), back)
    for row, other in zip(rows, back, strict=True):
        assert (row - other).abs().max() <= row.abs().max() / 254 * 1.001
    zeros = [torch.zeros(3, 2, 32)]
    cache._unpack(memoryview(bytearray(b"".join(cache._packed(zeros)))), zeros)
    assert not zeros[0].any()


def test_the_two_precisions_never_meet(fresh, space) -> None:
    engine = fresh()
    engine.logits(list(range(4, 40)))
    PrefixCache(engine, space).keep()
    other = fresh()
    assert PrefixCache(other, space, precision=Precision.EIGHT_BITS).fetch(list(range(4, 40))) == 0


def test_an_answer_is_given_again_for_the_same_request_only(fresh, space) -> None:
    engine = fresh()
    read(engine)

    def answer(prompt: str, **options: object) -> tuple[list[tuple[int, str, float]], int]:
        talk = Session(engine, responses=ResponseCache(space, engine.model_id))
        sampling = Sampling(**options)  # type: ignore[arg-type]
        found = [(t.id, t.text, t.logprob) for t in talk.stream(
            prompt, max_tokens=5, sampling=sampling)]
        assert talk.messages[-1].content == "".join(text for _, text, _ in found)
        return found, read(engine)

    first, work = answer("the fox", temperature=1.0, seed=1)
    assert work
    assert answer("the fox", temperature=1.0, seed=1) == (first, 0)
    assert answer("the fox", temperature=1.0, seed=2)[1]
    assert answer("the dog", temperature=1.0, seed=1)[1]
    answer("the fox", temperature=1.0)
    assert answer("the fox", temperature=1.0)[1]  # chance is not to be repeated


def test_an_answer_that_was_cut_off_is_not_given_again(fresh, space) -> None:
    engine = fresh()
    for _ in range(2):
        read(engine)
        talk = Session(engine, responses=ResponseCache(space, engine.model_id))
        stream = talk.stream("the fox", max_tokens=9)
        next(stream)
        talk.stop()
        list(stream)
        assert talk.stats.finish == "stop"
        assert space.sizes() == {}
