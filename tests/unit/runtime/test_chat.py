"""A turn is settled once, wherever Ctrl-C comes; settings are checked where they are made."""

from __future__ import annotations

import gc
import random
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
from tests.interrupts import Interrupt
from tests.unit.runtime.conftest import FakeEngine

from cloister.errors import EmptyPrompt, EngineBusy, SettingError
from cloister.message import Message
from cloister.runtime.chat import Answer, Ask, Sampling, Stats, Token, Turn
from cloister.runtime.session import Session
from cloister.vault.namespace import Namespace

Fresh = Callable[..., FakeEngine]
SEED = 3
WATCHED = {"chat.py", "session.py", "generate.py", "core.py", "conversation.py", "prefix.py",
           "interrupt.py"}


def interrupt_anywhere(begin: Callable[[], Session], count: int) -> None:
    """Interrupt a question at `count` points of it, and go on as its user would."""
    rng = random.Random(SEED)
    print("seed", SEED)

    def ask(session: Session, heard: list[str]) -> None:
        for token in session.stream("the fox", max_tokens=4):
            heard.append(token.text)

    with Interrupt(WATCHED) as counter:
        ask(begin(), [])
    total = counter.passed
    assert total > 100
    for place in sorted(rng.sample(range(1, total + 1), min(count, total))):
        session, heard = begin(), list[str]()
        session.ask("first", max_tokens=2)
        interrupted = False
        with Interrupt(WATCHED, place) as interrupt:
            try:
                ask(session, heard)
            except KeyboardInterrupt:
                interrupted = True
        assert interrupted or not interrupt.where.startswith("core.py")
        asked = ["first", "the fox", "then"]
        answer = session.ask("then", max_tokens=2)  # nothing is busy
        said = session.messages
        texts = [message.content for message in said[::2]]
        assert texts in (asked, asked[::2]), interrupt.where
        assert said[-1] == answer
        if heard:
            assert texts == asked, interrupt.where
            assert said[3].content.startswith("".join(heard)), interrupt.where
        assert Session(session.engine).ask("and I", max_tokens=2).content, interrupt.where
        refused = list[BaseException]()

        def elsewhere(session: Session = session, refused: list[Any] = refused) -> None:
            try:
                session.ask("now", max_tokens=1)
            except EngineBusy as error:
                refused.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not refused, interrupt.where
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_ctrl_c_at_any_point_of_a_question_loses_nothing_and_leaves_nothing_busy(
    fresh: Fresh
) -> None:
    engine = fresh()
    interrupt_anywhere(lambda: Session(engine), 150)


@pytest.mark.slow
def test_ctrl_c_at_any_point_leaves_vault_and_memory_the_same(
    fresh: Fresh, space: Namespace
) -> None:
    engine, names = fresh(), list[str]()

    def begin() -> Session:
        names.append(f"interrupted {len(names)}")
        return Session(engine, vault=space.vault, name=names[-1])

    sessions: list[Session] = []
    interrupt_anywhere(lambda: sessions.append(begin()) or sessions[-1], 60)
    for name, session in zip(names, sessions, strict=True):
        assert Session(fresh(), vault=space.vault, name=name).messages == session.messages


def tokens(*texts: str) -> Generator[Token]:
    for number, text in enumerate(texts):
        yield Token(number, text, -1.0)


def test_a_turn_is_settled_once_with_what_was_read_of_it() -> None:
    settled, turns = list[list[str]](), list[Turn]()

    def settle(read: list[Token]) -> None:
        settled.append([token.text for token in read])

    answer = Answer(Turn(tokens("a", "b", "c"), settle, turns))
    assert [next(answer).text, next(answer).text] == ["a", "b"]
    assert settled == []
    answer.close()
    answer.close()
    assert list(answer) == []
    del answer
    gc.collect()
    assert settled == [["a", "b"]]
    assert [token.text for token in Answer(Turn(tokens("a"), settle, turns))] == ["a"]
    assert settled[1:] == [["a"]]
    assert turns == []


def test_an_answer_cannot_be_closed_from_within_itself(engine: FakeEngine) -> None:
    """As the handler of a signal might, in the middle of the program's call."""
    session, refused = Session(engine), list[EngineBusy]()

    def act() -> None:
        for busy in (session.close, lambda: session.stream("the dog")):
            with pytest.raises(EngineBusy) as caught:
                busy()
            refused.append(caught.value)

    stream = session.stream("the fox", max_tokens=3)
    next(stream)
    engine.program.before = act
    assert len(list(stream)) == 2
    engine.program.before = lambda: None
    assert len(refused) == 4
    assert [message.content for message in session.messages[::2]] == ["the fox"]
    assert session.ask("the dog", max_tokens=2)


@pytest.mark.parametrize(("settings", "error", "match"), [
    ({"max_tokens": 0}, SettingError, "max_tokens is 0"),
    ({"max_tokens": "5"}, SettingError, "max_tokens is 5"),
    ({"top": -1}, SettingError, "top is -1"),
    ({"forced": (-1,)}, SettingError, "no token id"),
    ({"forced": (1, 2.0)}, SettingError, "no token id"),
    ({"forced": (1, 2, 3), "max_tokens": 2}, SettingError, "3 tokens and max_tokens is 2"),
    ({"schema": {}, "tools": []}, SettingError, "one constraint"),
    ({"grammar": "", "choices": []}, SettingError, "one constraint"),
    ({"messages": ()}, EmptyPrompt, "no message"),
])
def test_a_question_out_of_bounds_is_refused_by_name(
    settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Ask(**{"messages": (Message(role="user", content="x"),), **settings})


def test_a_question_is_a_text_a_message_or_several() -> None:
    user = Message(role="user", content="x")
    assert Ask.of("x") == Ask.of(user) == Ask.of([user])
    assert Ask.of("x", max_tokens=None, sampling=None) == Ask.of("x", sampling=Sampling())
    assert Ask.of("x", choices=["a"]).constraints == (None, None, ["a"], None)
    assert Stats(tokens=3, decode_s=0.5).decode_tokens_per_s == 4
    assert Stats(tokens=3, forced_tokens=2, decode_s=0.5).decode_tokens_per_s is None
    assert "77" not in repr(Ask.of("x", forced=(77,)))
