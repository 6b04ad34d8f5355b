"""A conversation goes on where it stopped, whatever happened in between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_bundle
from tests.unit.runtime.conftest import FakeEngine

from cloister.bundle import Bundle
from cloister.errors import (
    ContextExceeded,
    EmptyPrompt,
    EngineBusy,
    IncompatibleProgram,
    InvalidText,
    NotEnoughDisk,
    SessionMismatch,
    SettingError,
)
from cloister.message import Message
from cloister.runtime.chat import Ask, Sampling, Token
from cloister.runtime.session import Session
from cloister.vault.namespace import Namespace
from cloister.vault.store import Vault

Fresh = Callable[..., FakeEngine]


class Failure(Exception):
    """Of a reader, or of the program."""


def answer(session: Session, prompt: str, n: int = 5, **options: Any) -> list[int]:
    return [token.id for token in session.stream(prompt, max_tokens=n, **options)]


def said(session: Session) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in session.messages]


def test_the_prompt_is_read_in_chunks(engine: FakeEngine) -> None:
    session = Session(engine)
    answer(session, "the quick brown fox", 1)
    lengths = [length for _, length in engine.program.calls]
    assert max(lengths) <= 8
    assert sum(lengths) == session.stats.prompt_tokens


def test_a_second_turn_reads_only_what_is_new(engine: FakeEngine) -> None:
    session = Session(engine)
    answer(session, "the fox", 3)
    engine.program.calls.clear()
    answer(session, "the dog", 1)
    assert engine.program.calls[0][0] > 2  # the first turn's prompt was not read again


def test_turns_give_what_one_reading_of_the_whole_gives(bundle: Bundle) -> None:
    one = Session(FakeEngine(bundle.path), system="call")
    answer(one, "the fox", 3)
    before = one.messages
    second = answer(one, "the dog", 4)
    other = Session(FakeEngine(bundle.path), system="call", messages=before[1:])
    assert other.messages == before
    assert answer(other, "the dog", 4) == second
    assert other.messages == one.messages


def test_sessions_that_take_turns_on_one_engine_each_find_their_own(engine: FakeEngine) -> None:
    one, two = Session(engine), Session(engine)
    mixed = [answer(one, "the fox", 3), answer(two, "lazy dog", 3), answer(one, "jumps", 3)]
    alone = Session(engine)
    assert [answer(alone, "the fox", 3), answer(alone, "jumps", 3)] == mixed[::2]
    assert answer(Session(engine), "lazy dog", 3) == mixed[1]


def test_a_question_during_another_sessions_answer_is_refused_and_neither_loses_anything(
    engine: FakeEngine
) -> None:
    one, two = Session(engine), Session(engine)
    stream = one.stream("the fox", max_tokens=6)
    ids = [next(stream).id, next(stream).id]
    with pytest.raises(EngineBusy, match="another answer"):
        answer(two, "lazy dog", 6)
    assert two.messages == []
    ids += [token.id for token in stream]
    assert ids == answer(Session(engine), "the fox", 6)
    assert answer(two, "lazy dog", 6) == answer(Session(engine), "lazy dog", 6)


def test_a_stop_from_another_thread_ends_within_one_token(engine: FakeEngine) -> None:
    session, seen = Session(engine), []
    for token in session.stream("the fox"):
        seen.append(token)
        if len(seen) == 3:
            thread = threading.Thread(target=session.stop)
            thread.start()
            thread.join()
    assert len(seen) == 3
    assert session.stats.finish == "stop"
    assert answer(session, "and the dog", 2)  # the session is still good


def test_an_answer_that_is_closed_early_leaves_a_usable_session(engine: FakeEngine) -> None:
    session = Session(engine)
    stream = session.stream("the fox")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert [message.role for message in session.messages][:1] == ["user"]
    assert answer(session, "the dog", 2)


def test_the_answer_ends_at_the_limit_or_at_a_full_context(engine: FakeEngine) -> None:
    session = Session(engine)
    assert len(answer(session, "the fox", 4)) == 4
    assert session.stats.finish == "length"
    long = Session(engine)
    tokens = list(long.stream("the fox"))
    assert long.stats.finish in ("context", "end")
    assert long.stats.prompt_tokens + len(tokens) <= engine.context


def test_a_conversation_that_went_back_goes_on_as_if_the_rest_had_never_been(
    bundle: Bundle
) -> None:
    straight, back = (Session(FakeEngine(bundle.path), system="call") for _ in range(2))
    for session in (straight, back):
        session.ask("the fox", max_tokens=3)
    back.ask("jumps", max_tokens=3)
    expected = straight.ask("over", max_tokens=3)
    for ask in (Ask.of("over", max_tokens=3, after=3), Ask.of("over", max_tokens=3, after=3)):
        assert "".join(token.text for token in back.answer(ask)) == expected.content
        assert back.messages == straight.messages
    for after in (0, 6):
        with pytest.raises(SettingError, match="from 1 to the 5 messages"):
            back.answer(Ask.of("lazy", after=after))
    with pytest.raises(ContextExceeded):
        back.answer(Ask.of("lazy " * 100, after=1))
    assert back.messages == straight.messages
    back.forget()
    assert back.messages == straight.messages[:1]


def test_asking_gives_the_whole_answer_as_a_message(engine: FakeEngine) -> None:
    session = Session(engine, system="call")
    message = session.ask("the fox", max_tokens=6)
    assert message.role == "assistant"
    text = "".join(
        token.text for token in Session(engine, system="call").stream("the fox", max_tokens=6))
    assert message.content == text
    assert session.messages[-1] == message
    more = [Message(role="user", content="the dog"), Message(role="assistant", content="so"),
            Message(role="user", content="and")]
    last = session.ask(more, max_tokens=2)
    assert session.messages[-4:] == [*more, last]
    assert session.ask(Message(role="user", content="jumps"), max_tokens=2) == session.messages[-1]


@pytest.mark.parametrize(("prompt", "options", "error", "match"), [
    ("fox " * 100, {}, ContextExceeded, r"\d+ tokens .* 64"),
    ("", {}, EmptyPrompt, "at least one character"),
    ([], {}, EmptyPrompt, "at least one"),
    ("\ud800", {}, InvalidText, "Unicode"),
    ("x", {"max_tokens": 0}, SettingError, "max_tokens is 0"),
    ("x", {"top": -1}, SettingError, "top is -1"),
    ("x", {"top": 301}, SettingError, "300"),
    ("x", {"schema": {}, "choices": ["a"]}, SettingError, "one constraint"),
])
def test_what_cannot_be_asked_is_refused_at_once_and_nothing_changes(
    engine: FakeEngine, prompt: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    session = Session(engine)
    with pytest.raises(error, match=match) as caught:
        session.stream(prompt, **options)
    assert "fox" not in str(caught.value)
    assert session.messages == []
    assert engine.program.calls == []
    assert answer(Session(engine), "the dog", 2)  # and the engine is free


def test_a_branch_goes_on_from_a_forced_beginning_and_is_what_is_kept(engine: FakeEngine) -> None:
    plain = list(Session(engine).stream("the fox", max_tokens=6, top=5))
    other = plain[2].top[1][0]
    session = Session(engine)
    branch = list(session.answer(Ask.of(
        "the fox", max_tokens=6, top=5, forced=(plain[0].id, plain[1].id, other))))
    assert [token.id for token in branch[:3]] == [plain[0].id, plain[1].id, other]
    assert branch[:2] == plain[:2] and branch[2].rank == 2
    assert session.stats.forced_tokens == 3 and session.stats.tokens == len(branch)
    assert session.messages[-1].content == "".join(token.text for token in branch)
    with pytest.raises(SettingError, match="below 300"):
        session.answer(Ask.of("x", forced=(300,)))


ALTERNATING = """{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{{ m.content }}{% endfor %}"""


@pytest.mark.parametrize(
    "how", ["ended at once", "stopped before it began", "broken", "closed", "dropped"])
def test_a_prompt_without_an_answer_does_not_block_a_template_that_wants_turns(
    tmp_path: Path, tokenizer_dir: Path, how: str
) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(ALTERNATING)
    bundle = make_bundle(tmp_path / "turns.cloister", tmp_path / "tokenizer")
    engine = FakeEngine(bundle.path, prefer=(0,) if how == "ended at once" else ())  # 0 ends
    session = Session(engine)
    stream: Any = session.stream("the fox", max_tokens=3)
    if how == "stopped before it began":
        session.stop()
    with pytest.MonkeyPatch.context() as patch:
        if how == "broken":
            patch.setattr(
                engine.program, "forward", lambda tokens, start: torch.full((1, 300), torch.nan))
            with pytest.raises(IncompatibleProgram):
                list(stream)
        elif how == "closed":
            stream.close()
        elif how == "dropped":
            stream = None
        else:
            list(stream)
    assert session.messages == []
    session.stream("the dog")  # is not refused


def test_a_seed_gives_the_same_tokens_again(engine: FakeEngine) -> None:
    sampling = Sampling(temperature=1.0, seed=9)
    first = answer(Session(engine), "the fox", 8, sampling=sampling)
    assert first == answer(Session(engine), "the fox", 8, sampling=sampling)
    assert first != answer(Session(engine), "the fox", 8, sampling=Sampling(temperature=1., seed=8))


def test_nothing_shows_text_in_its_repr(engine: FakeEngine) -> None:
    session = Session(engine, system="secret")
    stream = session.stream("secret fox")
    message = Message(role="user", content="secret fox")
    ask = Ask.of("secret fox", schema={"const": "secret"}, top=1)
    for thing in (session, engine, next(stream), Token(1, "secret", -1.0), stream, message, ask):
        assert "secret" not in repr(thing)
        assert "fox" not in repr(thing)


# What becomes of a turn that its reader leaves. Each way is tried on a conversation in memory and
# on one that is kept, which a fresh session of the same name then reads.

PROMPT, NEXT, LAST = "the fox", "the dog", "the cat"


@pytest.fixture(params=["in memory", "kept"])
def begin(
    request: pytest.FixtureRequest, fresh: Fresh, space: Namespace
) -> Iterator[Callable[[], Session]]:
    """Begins the one conversation, or goes on with it; at last memory and vault are compared."""
    begun: list[Session] = []
    kept = request.param == "kept"

    def make(engine: FakeEngine | None = None) -> Session:
        begun.append(Session(
            engine or fresh(), system="call", vault=space.vault if kept else None,
            name="work" if kept else None))
        return begun[-1]

    yield make
    if kept:
        again = Session(fresh(), vault=space.vault, name="work")
        assert again.messages == begun[-1].messages


def texts(session: Session, *prompts: str) -> None:
    """Check that the session holds these questions, in order, each with its answer."""
    messages = session.messages[1:]
    assert [message.content for message in messages[::2]] == list(prompts)
    assert all(message.role == "user" for message in messages[::2])
    assert all(message.role == "assistant" and message.content for message in messages[1::2])


def test_a_stream_left_by_break_and_still_named_ends_at_the_next_question(
    begin: Callable[[], Session]
) -> None:
    session = begin()
    stream: Any = session.stream(PROMPT)
    read = ""
    for token in stream:
        read += token.text
        if len(read) > 2:
            break
    assert len(session.messages) == 1  # its reader may yet go on
    first = session.ask(NEXT, max_tokens=4)
    second = session.ask(LAST, max_tokens=4)
    before = said(session)
    assert list(stream) == []  # it has ended
    stream = None
    assert said(session) == before == [
        ("system", "call"), ("user", PROMPT), ("assistant", read), ("user", NEXT),
        ("assistant", first.content), ("user", LAST), ("assistant", second.content)]
    assert session.ask(PROMPT, max_tokens=3)


@pytest.mark.parametrize("how", ["dropped", "closed", "closed twice", "session closed", "with"])
def test_a_stream_that_is_let_go_of_is_kept_as_far_as_it_was_read(
    begin: Callable[[], Session], how: str
) -> None:
    session = begin()
    stream: Any = session.stream(PROMPT)
    read = "".join(next(stream).text for _ in range(4))
    match how:
        case "dropped":
            stream = None
        case "closed":
            stream.close()
        case "closed twice":
            stream.close()
            stream.close()
        case "session closed":
            session.close()
        case "with":
            with session:
                pass
    assert said(session)[1:] == [("user", PROMPT), ("assistant", read)]
    session.ask(NEXT, max_tokens=3)
    texts(session, PROMPT, NEXT)


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
def test_an_exception_of_the_reader_keeps_what_it_had_read(
    begin: Callable[[], Session], error: type[BaseException]
) -> None:
    session = begin()

    def read() -> None:
        for count, token in enumerate(session.stream(PROMPT)):
            seen.append(token.text)
            if count == 3:
                raise error

    seen: list[str] = []
    with pytest.raises(error) as caught:
        read()
    session.ask(NEXT, max_tokens=3)  # while the exception still holds the stream
    del caught
    texts(session, PROMPT, NEXT)
    assert session.messages[2].content == "".join(seen)


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 2, 6])
def test_a_failure_of_the_program_keeps_what_was_answered_before_it(
    begin: Callable[[], Session], error: type[BaseException], call: int
) -> None:
    """Ctrl-C in the middle of its call, too; the first two calls read the prompt."""
    session = begin()
    session.ask(PROMPT, max_tokens=3)
    program, seen, calls = session.engine.program, [], iter(range(99))  # type: ignore[var-annotated]

    def fail() -> None:
        if next(calls) == call:
            raise error if error is Failure else signal.raise_signal(signal.SIGINT)

    program.before = fail  # type: ignore[attr-defined]
    with pytest.raises(error):
        for token in session.stream(NEXT):
            seen.append(token.text)
    program.before = lambda: None  # type: ignore[attr-defined]
    session.ask(LAST, max_tokens=3)
    assert bool(seen) is (call > 1)
    texts(session, PROMPT, *[NEXT] * bool(seen), LAST)
    if seen:
        assert session.messages[4].content == "".join(seen)


def test_ctrl_c_while_an_answer_is_being_kept_waits_until_it_is(
    begin: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin()
    keep = Session._keep

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        keep(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Session, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.ask(PROMPT, max_tokens=3)
    stream: Any = session.stream(NEXT)
    next(stream), next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    monkeypatch.undo()
    texts(session, PROMPT, NEXT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    session.ask(LAST, max_tokens=3)
    texts(session, PROMPT, NEXT, LAST)


def test_a_question_while_another_thread_reads_the_answer_is_refused_and_loses_nothing(
    begin: Callable[[], Session]
) -> None:
    session = begin()
    began, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        assert go_on.wait(20)

    session.engine.program.before = wait  # type: ignore[attr-defined]
    seen: list[str] = []
    stream = session.stream(PROMPT, max_tokens=4)
    thread = threading.Thread(target=lambda: seen.extend(token.text for token in stream))
    thread.start()
    assert began.wait(20)
    for busy in (lambda: session.stream(NEXT), session.close, lambda: next(stream)):
        with pytest.raises(EngineBusy):
            busy()
    go_on.set()
    thread.join()
    assert session.messages[2].content == "".join(seen)
    session.ask(NEXT, max_tokens=2)
    texts(session, PROMPT, NEXT)


def test_a_full_disk_while_an_answer_is_kept_is_said_and_memory_agrees_with_the_vault(
    fresh: Fresh, space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(fresh(), vault=space.vault, name="work")
    session.ask(PROMPT, max_tokens=3)

    def full(*_: object, **__: object) -> None:
        raise NotEnoughDisk("full")

    with monkeypatch.context() as patch:
        patch.setattr(Namespace, "append", full)
        for _ in range(2):
            with pytest.raises(NotEnoughDisk):
                session.ask(NEXT, max_tokens=3)
            assert Session(fresh(), vault=space.vault, name="work").messages == session.messages
    session.ask(LAST, max_tokens=3)  # there is room again: the answer that was read is kept, too
    assert Session(fresh(), vault=space.vault, name="work").messages == session.messages
    assert [message.content for message in session.messages[::2]] == [PROMPT, NEXT, LAST]


def test_a_full_disk_while_a_dropped_answer_is_kept_is_not_passed_over(
    fresh: Fresh, space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody hears of it when it is dropped: so at the next question, or it is kept then."""
    session = Session(fresh(), vault=space.vault, name="work")

    def full(*_: object, **__: object) -> None:
        raise NotEnoughDisk("full")

    with monkeypatch.context() as patch:
        patch.setattr(Namespace, "append", full)
        stream: Any = session.stream(PROMPT)
        read = "".join(next(stream).text for _ in range(3))
        stream = None
        with pytest.raises(NotEnoughDisk):
            session.stream(NEXT)
    session.ask(NEXT, max_tokens=3)
    assert said(session)[:2] == [("user", PROMPT), ("assistant", read)]
    assert len(session.messages) == 4
    assert Session(fresh(), vault=space.vault, name="work").messages == session.messages


@pytest.mark.slow
def test_an_answer_unfinished_at_the_end_of_the_program_is_in_the_vault_afterwards(
    fresh: Fresh, space: Namespace, long_bundle: Bundle
) -> None:
    vault = space.vault
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.unit.runtime.conftest import LETTERS, FakeEngine\n"
        "from cloister.runtime.session import Session\n"
        "from cloister.vault.keys import Keyholder\n"
        "from cloister.vault.store import Vault\n"
        "vault = Vault(Path(sys.argv[1]), Keyholder(keyfile=Path(sys.argv[2])))\n"
        "engine = FakeEngine(Path(sys.argv[3]), LETTERS)\n"
        "session = Session(engine, vault=vault, name=sys.argv[4])\n"
        "session.ask('the fox', max_tokens=3)\n"
        "stream = session.stream('the dog')\n"
        "print(next(stream).text + next(stream).text, end='')\n"
        "if sys.argv[4] == 'raises':\n"
        "    raise RuntimeError\n"
    )
    endings = ("ends", "raises")
    runs = [subprocess.Popen(
        [sys.executable, "-c", code, vault.directory, vault.directory.parent / "key",
         long_bundle.path, ending],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)}) for ending in endings]
    for run, ending in zip(runs, endings, strict=True):
        out, err = run.communicate()
        assert run.returncode == (ending == "raises"), err
        assert out
        again = Session(fresh(), vault=vault, name=ending)
        assert len(again.messages) == 4
        assert again.messages[-2:] == [
            Message(role="user", content="the dog"),
            Message(role="assistant", content=out.decode())]


def test_two_sessions_of_one_name_do_not_write_over_each_other(
    fresh: Fresh, vault: Vault
) -> None:
    one = Session(fresh(), vault=vault, name="work")
    two = Session(fresh(), vault=vault, name="work")
    stream: Any = one.stream(PROMPT)
    next(stream)
    two.ask(NEXT, max_tokens=3)
    with pytest.raises(SessionMismatch, match="Another process"):
        stream.close()
    texts(Session(fresh(), system="x", messages=two.messages), NEXT)
    assert Session(fresh(), vault=vault, name="work").messages == two.messages


def test_two_schemas_with_other_orders_are_two_constraints_and_two_answers(
    fresh: Any, space: Any
) -> None:
    from cloister.runtime.chat import Ask
    from cloister.runtime.responses import ResponseCache

    cache = ResponseCache(space, "00" * 32)
    one, other = ({"properties": {key: {} for key in order}} for order in ("ab", "ba"))
    names = {cache._name([1], Ask.of("x", schema=schema)) for schema in (one, other)}
    assert len(names) == 2
