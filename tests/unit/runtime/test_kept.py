"""A kept conversation goes on where it stopped, and what was read is not read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import SHAPE, make_bundle
from tests.unit.runtime.conftest import FakeEngine

from cloister.bundle import Bundle
from cloister.errors import NotEnoughDisk, SessionMismatch, SettingError
from cloister.message import Message, ToolCall
from cloister.parts import Picture
from cloister.runtime.chat import Ask, Sampling, Token
from cloister.runtime.conversation import Conversation, forget
from cloister.runtime.core import MediaPosition, Position
from cloister.runtime.prefix import BLOCK, Precision, PrefixCache
from cloister.runtime.session import Session
from cloister.vault.namespace import Kind, Namespace
from cloister.vault.retention import Retention

Fresh = Callable[..., FakeEngine]
LONG = "the quick brown fox jumps over the lazy dog, what is the weather in Paris tomorrow? " * 4


def session(
    engine: FakeEngine, space: Namespace, name: str | None = "work", system: str | None = "call",
    **options: Any,
) -> Session:
    return Session(
        engine, name=name, system=system, vault=space.vault, namespace=space.name, **options)


def cached(engine: FakeEngine, space: Namespace, system: str | None = None) -> Session:
    return session(engine, space, name=None, system=system, cached=True)


def ask(session: Session, prompt: str, n: int = 6) -> list[tuple[int, float]]:
    return [(t.id, t.logprob) for t in session.stream(prompt, max_tokens=n)]


def test_a_conversation_goes_on_after_a_restart_as_if_there_had_been_none(
    fresh: Fresh, space: Namespace
) -> None:
    unbroken = Session(fresh(), system="call")
    expected = [ask(unbroken, LONG), ask(unbroken, "the dog"), ask(unbroken, "jumps")]

    first = session(fresh(), space)
    assert [ask(first, LONG), ask(first, "the dog")] == expected[:2]
    length = len(first.engine.cached)
    assert length > 2 * BLOCK
    engine = fresh()
    second = session(engine, space, system=None)
    assert second.messages == first.messages == unbroken.messages[:-2]
    assert second.restored_tokens == length
    assert ask(second, "jumps") == expected[2]
    assert engine.program.read() < BLOCK
    assert "fox" not in repr(second) + repr(second._conversation)


def test_sessions_of_a_namespace_share_what_they_begin_with(
    fresh: Fresh, space: Namespace
) -> None:
    engine = fresh()
    expected = ask(cached(engine, space, system=LONG), "the dog")
    whole = engine.program.read()
    other = fresh()
    shared = cached(other, space, system=LONG)
    assert ask(shared, "what about the cat") != expected
    assert shared.stats.restored_tokens > 0
    assert shared.stats.restored_tokens % BLOCK == 0
    assert other.program.read() < whole - shared.stats.restored_tokens + 20
    unshared = Session(fresh(), system=LONG)
    assert ask(unshared, "what about the cat") == ask(
        cached(fresh(), space, system=LONG), "what about the cat")


def test_another_namespace_shares_nothing(fresh: Fresh, space: Namespace) -> None:
    ask(cached(fresh(), space), LONG)
    apart = cached(fresh(), space.vault.namespace("other"))
    engine = apart.engine
    ask(apart, LONG)
    assert apart.stats.restored_tokens == 0
    assert engine.program.read() > BLOCK  # type: ignore[attr-defined]


def test_a_conversation_without_a_name_or_a_cache_leaves_nothing_in_the_vault(
    fresh: Fresh, space: Namespace
) -> None:
    ask(session(fresh(), space, name=None), LONG)
    assert space.sizes() == {}


def test_only_what_a_request_read_itself_is_kept(fresh: Fresh, space: Namespace) -> None:
    """Not what another conversation left in the engine."""
    engine = fresh()
    ask(Session(engine, system="secret " * 40), "the fox")
    ask(cached(engine, space, system="call"), "the dog")
    assert Kind.PREFIX not in space.sizes()  # less than a block of its own
    ask(cached(engine, space, system="call"), LONG)
    other = fresh()
    left = PrefixCache(other, space)
    secret = other.tokenizer.encode_chat([
        Message(role="system", content="secret " * 40), Message(role="user", content="the fox")])
    assert left.fetch(secret) == 0


IDS = list(range(4, 4 + 4 * BLOCK - 20))


@pytest.mark.parametrize(
    "shared", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, len(IDS) - 1])
def test_where_texts_part_only_what_they_share_is_put_back(
    fresh: Fresh, space: Namespace, shared: int
) -> None:
    engine = fresh()
    engine.extend(IDS)
    PrefixCache(engine, space).keep(IDS)
    other = fresh()
    changed = [*IDS[:shared], *(id_ + 30 for id_ in IDS[shared:])]
    assert PrefixCache(other, space).fetch(changed) == shared // BLOCK * BLOCK
    assert torch.equal(other.extend(changed), fresh().extend(changed))


def test_the_last_token_is_always_read_for_its_logits(fresh: Fresh, space: Namespace) -> None:
    engine = fresh()
    ids = IDS[:2 * BLOCK]  # two whole blocks
    expected = engine.extend(ids)
    PrefixCache(engine, space).keep(ids)
    other = fresh()
    assert PrefixCache(other, space).fetch(ids) == BLOCK
    assert torch.equal(other.extend(ids), expected)


def test_nothing_is_put_back_over_what_the_engine_holds_already(
    fresh: Fresh, space: Namespace
) -> None:
    engine = fresh()
    engine.extend(IDS)
    PrefixCache(engine, space).keep(IDS)
    other = fresh()
    other.extend(IDS[:BLOCK + 9])
    assert PrefixCache(other, space).fetch(IDS[:BLOCK + 30]) == 0
    assert PrefixCache(other, space).fetch(IDS) == 3 * BLOCK - (BLOCK + 9)
    assert torch.equal(other.extend(IDS), fresh().extend(IDS))


@pytest.mark.parametrize("lost", ["first", "last", "state"])
def test_what_is_damaged_is_read_again(fresh: Fresh, space: Namespace, lost: str) -> None:
    first = session(fresh(), space)
    ask(first, LONG)
    unbroken = Session(fresh(), system="call")
    ask(unbroken, LONG)
    expected = ask(unbroken, "the dog")
    names = PrefixCache(first.engine, space).names(first.engine.cached, b"work")
    assert len(names) > 2
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
    assert third.restored_tokens == len(second.engine.cached)


def test_a_beginning_with_a_picture_is_found_again_by_its_digest_and_places(
    media_bundle: Bundle, space: Namespace
) -> None:
    def seeing() -> FakeEngine:
        return FakeEngine(media_bundle.path)

    def picture(engine: FakeEngine, shade: int) -> list[MediaPosition]:
        return engine.media(
            Picture(data=bytes([shade]) * 72, height=4, width=6), PrefixCache(engine, space))

    engine = seeing()
    shown: list[Position] = [*IDS[:60], *picture(engine, 1), *IDS[:90]]
    expected = engine.extend(shown)
    PrefixCache(engine, space).keep(shown, b"seen")
    other = seeing()
    assert PrefixCache(other, space).fetch(shown) == len(shown) // BLOCK * BLOCK
    assert torch.equal(other.extend(shown), expected)
    assert other.program.encoded == []  # what is read already needs no vectors
    for changed in ([*IDS[:60], *picture(engine, 2), *IDS[:90]],
                    [*IDS[:60], *picture(engine, 1)[::-1], *IDS[:90]]):
        assert PrefixCache(seeing(), space).fetch(changed) == 0
    third = seeing()
    assert PrefixCache(third, space).resume(b"seen") == len(shown)
    assert third.cached == shown
    assert torch.equal(third.extend([*shown, 5]), engine.extend([*shown, 5]))


def test_another_bundle_or_system_prompt_is_refused_and_nothing_is_lost(
    fresh: Fresh, space: Namespace, tmp_path: Path, tokenizer_dir: Path
) -> None:
    ask(session(fresh(), space), "the fox")
    other = make_bundle(
        tmp_path / "other.cloister", tokenizer_dir, recipe="8da8w", context=512,
        shape=replace(SHAPE, context=512))
    with pytest.raises(SessionMismatch, match="bundle"):
        session(fresh(other.path), space)
    with pytest.raises(SessionMismatch, match="system"):
        session(fresh(), space, system="intent")
    for options in ({"name": "work"}, {"cached": True}):
        with pytest.raises(SettingError, match="vault"):
            Session(fresh(), **options)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="kv is 'int4'"):
        session(fresh(), space, kv="int4")
    assert len(session(fresh(), space).messages) == 3


@pytest.mark.parametrize("name", ["", "x" * 257])
def test_a_session_name_out_of_bounds_is_refused_without_it(
    fresh: Fresh, space: Namespace, name: str
) -> None:
    with pytest.raises(SettingError) as caught:
        session(fresh(), space, name=name)
    assert "xx" not in str(caught.value)
    ask(session(fresh(), space, name="na\u00efve \ud800 \n/.."), "any other will do")


def test_what_is_forgotten_leaves_no_state_behind(fresh: Fresh, space: Namespace) -> None:
    one = session(fresh(), space)
    ask(one, LONG)
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


def segments(space: Namespace) -> int:
    return len(list((space.vault.directory / "segments").iterdir()))


def test_what_a_conversation_goes_back_behind_is_gone_from_the_vault_with_its_state(
    fresh: Fresh, space: Namespace
) -> None:
    straight = session(fresh(), space, name="straight")
    ask(straight, "the fox")
    alone = segments(space)
    ask(straight, "what about the dog")
    expected = straight.messages
    kept = space.sizes()[Kind.HISTORY][1]
    assert forget(space, "straight")

    one = session(fresh(), space)
    ask(one, "the fox")
    ask(one, LONG)
    assert segments(space) > alone
    identity = space.identity(Kind.HISTORY, b"work")
    for _ in one.answer(Ask.of("what about the dog", max_tokens=6, after=3)):
        assert one.messages[3].content == LONG  # until the other answer is there
    assert one.messages == expected == session(fresh(), space).messages
    assert space.identity(Kind.HISTORY, b"work") != identity  # under another key
    assert (segments(space), space.sizes()[Kind.HISTORY][1]) == (alone, kept)
    engine = fresh()
    assert session(engine, space).restored_tokens == len(one.engine.cached)
    ask(one, "jumps")
    two = session(fresh(), space)
    two.forget()
    assert space.sizes() == {} and two.messages == one.messages[:1]
    with pytest.raises(SessionMismatch, match="Another process"):
        one.answer(Ask.of("the dog", after=3))
    ask(two, "the fox")
    assert session(fresh(), space).messages == two.messages


def test_a_conversation_that_another_process_went_on_with_is_not_gone_back_in(
    fresh: Fresh, space: Namespace
) -> None:
    one = Conversation(PrefixCache(fresh(), space), "work", system=None)
    said = [Message(role=role, content=role) for role in ("user", "assistant")]
    one.add(said)
    other = Conversation(PrefixCache(fresh(), space), "work", system=None)
    other.add(said)
    with pytest.raises(SessionMismatch, match="Another process"):
        one.add(said, after=0)
    again = Conversation(PrefixCache(fresh(), space), "work", system=None)
    assert again.messages == other.messages == [*said, *said]


def test_what_another_process_said_or_forgot_is_not_written_over(
    fresh: Fresh, space: Namespace
) -> None:
    first = session(fresh(), space)
    ask(first, LONG)
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
    fresh: Fresh, space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = PrefixCache.keep

    def late(*arguments: Any) -> None:
        forget(space, "work")
        keep(*arguments)

    monkeypatch.setattr(PrefixCache, "keep", late)
    ask(session(fresh(), space), LONG)
    assert space.sizes() == {}


def test_a_full_disk_costs_the_cache_and_not_the_conversation(
    fresh: Fresh, space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise NotEnoughDisk("full")

    with monkeypatch.context() as patch:
        patch.setattr(Namespace, "put_large", full)
        patch.setattr(Namespace, "put", full)
        talk = session(fresh(), space)
        assert len(ask(talk, LONG)) == 6
        assert len(ask(cached(fresh(), space), LONG)) == 6
    assert session(fresh(), space, system=None).messages == talk.messages


def test_an_answer_that_was_damaged_is_made_again(fresh: Fresh, space: Namespace) -> None:
    engine = fresh()

    def answer() -> tuple[list[tuple[int, float]], int]:
        engine.truncate(0)
        engine.program.read()
        return ask(cached(engine, space), "the fox"), engine.program.read()

    first, work = answer()
    assert work
    assert answer() == (first, 0)
    space.vault.db.rows("UPDATE records SET sealed = substr(sealed, 1, 60)")
    assert answer()[0] == first
    assert answer() == (first, 0)


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(
    fresh: Fresh, space: Namespace
) -> None:
    first = session(fresh(), space)
    stream = first.stream("the fox", max_tokens=20)
    said = "".join(next(stream).text for _ in range(3))
    stream.close()
    again = session(fresh(), space)
    assert again.messages == first.messages
    assert again.messages[-1] == Message(role="assistant", content=said)


def test_tool_calls_and_results_are_kept_with_what_was_said(
    fresh: Fresh, space: Namespace
) -> None:
    call = ToolCall(name="weather", arguments={"city": "Paris", "days": [1, 2.5, None, True]})
    said = [
        Message(role="user", content="rain?"),
        Message(role="assistant", content="{...}", tool_calls=(call,)),
        Message(role="tool", content='{"rain": true}', name="weather"),
    ]
    one = Conversation(PrefixCache(fresh(), space), "work", system=None)
    one.add(said)
    assert Conversation(PrefixCache(fresh(), space), "work", system=None).messages == said


@pytest.mark.parametrize(("known", "wanted"), [
    ((), 4), ((0, 1), 4), ((0, 1, 2, 3), 4), ((0, 1, 2, 3, 4, 5), 6)])
def test_a_conversation_catches_up_with_what_was_said_while_its_worker_died(
    fresh: Fresh, space: Namespace, known: tuple[int, ...], wanted: int
) -> None:
    said = [
        Message(role="user" if n % 2 == 0 else "assistant", content=f"text {n}") for n in range(6)
    ]
    one = Conversation(PrefixCache(fresh(), space), "work", system=None)
    one.add(said[:4])
    two = Conversation(PrefixCache(fresh(), space), "work", system=None)
    two.catch_up([said[n] for n in known])
    assert two.messages == said[:wanted]
    assert Conversation(PrefixCache(fresh(), space), "work", system=None).messages == two.messages


def test_an_answer_of_which_more_was_kept_than_heard_stays_whole(
    fresh: Fresh, space: Namespace
) -> None:
    said = [Message(role="user", content="a"), Message(role="assistant", content="all of it")]
    one = Conversation(PrefixCache(fresh(), space), "work", system=None)
    one.add(said)
    two = Conversation(PrefixCache(fresh(), space), "work", system=None)
    two.catch_up([said[0], Message(role="assistant", content="all")])
    assert two.messages == said
    with pytest.raises(SessionMismatch, match="otherwise"):
        two.catch_up([said[0], Message(role="assistant", content="none")])
    with pytest.raises(SessionMismatch, match="otherwise"):
        two.catch_up([Message(role="user", content="b")])


def test_the_cache_keeps_within_its_bounds(fresh: Fresh, space: Namespace) -> None:
    engine = fresh()
    cache = PrefixCache(engine, space, retention=Retention(most_bytes=2 * 4 * BLOCK))
    engine.extend(IDS)
    cache.keep(IDS)
    assert space.sizes()[Kind.PREFIX] == (2, 2 * 4 * BLOCK)


def test_eight_bits_come_close_at_a_quarter_of_the_size(fresh: Fresh, space: Namespace) -> None:
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


def test_the_two_precisions_never_meet(fresh: Fresh, space: Namespace) -> None:
    engine = fresh()
    engine.extend(IDS)
    PrefixCache(engine, space).keep(IDS)
    assert PrefixCache(fresh(), space, precision=Precision.EIGHT_BITS).fetch(IDS) == 0
    assert PrefixCache(fresh(), space).fetch(IDS)


def test_an_answer_is_given_again_for_the_same_request_only(
    fresh: Fresh, space: Namespace
) -> None:
    engine = fresh()

    def answer(
        prompt: str, schema: dict[str, object] | None = None, **options: object
    ) -> tuple[list[tuple[int, str, float]], int]:
        engine.truncate(0)
        engine.program.read()
        talk = cached(engine, space)
        sampling = Sampling(**options)  # type: ignore[arg-type]
        found = [(t.id, t.text, t.logprob) for t in talk.stream(
            prompt, max_tokens=9, sampling=sampling, schema=schema)]
        assert talk.messages[-1].content == "".join(text for _, text, _ in found)
        return found, engine.program.read()

    first, work = answer("the fox", temperature=1.0, seed=1)
    assert work
    assert answer("the fox", temperature=1.0, seed=1) == (first, 0)
    assert answer("the fox", temperature=1.0, seed=2)[1]
    assert answer("the dog", temperature=1.0, seed=1)[1]
    assert answer("the fox", {"enum": [True]}, temperature=1.0, seed=1)[1]
    assert not answer("the fox", {"enum": [True]}, temperature=1.0, seed=1)[1]
    assert answer("the fox", {"enum": [False]}, temperature=1.0, seed=1)[1]
    answer("the fox", temperature=1.0)
    assert answer("the fox", temperature=1.0)[1]  # what is drawn without a seed is not repeated


def test_a_branch_is_another_answer_than_the_first_and_given_again_with_all_of_its_tokens(
    fresh: Fresh, space: Namespace
) -> None:
    def told(forced: tuple[int, ...]) -> list[Token]:
        return list(cached(fresh(), space).answer(
            Ask.of("the dog", max_tokens=6, top=2, forced=forced)))

    first, branch = told(()), told((5,))
    assert branch[0].id == 5 != first[0].id
    assert (told(()), told((5,))) == (first, branch)


def test_an_answer_that_was_cut_off_is_not_given_again(fresh: Fresh, space: Namespace) -> None:
    engine = fresh()
    for _ in range(2):
        engine.truncate(0)
        engine.program.read()
        talk = cached(engine, space)
        stream = talk.stream("the fox", max_tokens=9)
        next(stream)
        talk.stop()
        list(stream)
        assert talk.stats.finish == "stop"
        assert engine.program.read()
        assert Kind.RESPONSES not in space.sizes()
