"""Nothing is lost or doubled, in whatever order answers are asked, left, interrupted and failed.

Two conversations of two names share an engine and a vault, and random things happen to them. Each
reader notes what it has read; after every operation the session's memory and the vault must hold
just that.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.unit.runtime.conftest import FakeEngine

from cloister.errors import EngineBusy
from cloister.message import Message
from cloister.runtime.conversation import Conversation
from cloister.runtime.prefix import PrefixCache
from cloister.runtime.session import Session
from cloister.vault.namespace import Namespace

SEED = 20_25
OPERATIONS = 12
Fresh = Callable[..., FakeEngine]


class Failure(Exception):
    """Of a reader or of the program."""


@dataclass
class Reader:
    """Who asks in one conversation, and what it knows: the turns that must be kept."""

    name: str
    session: Session
    turns: list[tuple[str, str]] = field(default_factory=list)
    stream: Any = None  # still named
    question: str = ""
    read: str = ""

    def settled(self) -> None:
        """The answer being read is over, in one way or another."""
        if self.read:
            self.turns.append((self.question, self.read))
        self.stream, self.question, self.read = None, "", ""


class Trial:
    """One interleaving."""

    def __init__(self, fresh: Fresh, space: Namespace, seed: int) -> None:
        self.rng = random.Random(seed)
        self.space, self.engine, self.other = space, fresh(prefer=()), fresh(prefer=())
        self.readers = [
            Reader(name, self.begin(name)) for name in (f"{seed} a", f"{seed} b")]
        self.asked = 0
        self.done: list[str] = []

    def begin(self, name: str) -> Session:
        return Session(self.engine, vault=self.space.vault, name=name, system="call")

    def run(self) -> None:
        for _ in range(OPERATIONS):
            reader = self.rng.choice(self.readers)
            operation = self.rng.choice(OPERATION)
            self.done.append(f"{operation.__name__} {reader.name[-1]}")
            operation(self, reader)
            self.check(reader)
        for reader in self.readers:
            reader.session.close()
            if reader.stream is not None:
                reader.settled()
        self.check(*self.readers)
        self.check_states()

    def open(self, reader: Reader) -> bool:
        """Ask something, and say whether the engine was free for it."""
        other = next(each for each in self.readers if each is not reader)
        self.asked += 1
        question = f"what is {self.asked}?"
        try:
            stream = reader.session.stream(question, max_tokens=self.rng.randint(1, 8))
        except EngineBusy:
            assert other.stream is not None
            return False
        assert other.stream is None
        if reader.stream is not None:  # ended by the new question
            reader.settled()
        reader.stream, reader.question = stream, question
        return True

    def take(self, reader: Reader, count: int) -> bool:
        """Read up to `count` tokens; whether the answer ended."""
        for _ in range(count):
            token = next(reader.stream, None)
            if token is None:
                reader.settled()
                return True
            reader.read += token.text
        return False

    def check(self, *kept: Reader) -> None:
        for reader in self.readers:
            wanted = [
                Message(role=role, content=text) for turn in reader.turns
                for role, text in zip(("user", "assistant"), turn, strict=True)]
            assert reader.session.messages[1:] == wanted, self.done
            if reader in kept:
                cache = PrefixCache(self.other, self.space)
                vault = Conversation(cache, reader.name, system="call")
                assert vault.messages == wanted, self.done

    def check_states(self) -> None:
        """Whoever goes on, in the engine or from the vault, reads what was really said."""
        for reader in self.readers:
            goes_on = [
                Session(self.engine, system="call", messages=reader.session.messages[1:]),
                Session(self.other, vault=self.space.vault, name=reader.name, system="call")]
            self.engine.truncate(self.rng.randint(0, 512))
            answers = [[(token.id, token.logprob) for token in session.stream(
                "and then?", max_tokens=3)] for session in goes_on]
            assert answers[0] == answers[1], self.done

    # Operations.

    def ask_whole(self, reader: Reader) -> None:
        if self.open(reader):
            while not self.take(reader, 1):
                pass

    def leave_named(self, reader: Reader) -> None:
        if self.open(reader):
            self.take(reader, self.rng.randint(0, 4))

    def go_on(self, reader: Reader) -> None:
        if reader.stream is not None:
            self.take(reader, self.rng.randint(1, 4))

    def drop(self, reader: Reader) -> None:
        if (reader.stream is not None or self.open(reader)) and not self.take(
            reader, self.rng.randint(0, 4)
        ):
            reader.stream = None
            reader.settled()

    def close(self, reader: Reader) -> None:
        if (reader.stream is not None or self.open(reader)) and not self.take(
            reader, self.rng.randint(0, 4)
        ):
            reader.stream.close()
            reader.settled()

    def close_session(self, reader: Reader) -> None:
        reader.session.close()
        if reader.stream is not None:
            assert next(reader.stream, None) is None
            reader.settled()

    def reader_fails(self, reader: Reader) -> None:
        if not self.open(reader):
            return
        stream, reader.stream = reader.stream, None
        error = self.rng.choice((Failure, KeyboardInterrupt))
        count = self.rng.randint(0, 4)

        def read(stream: Any) -> None:
            for number, token in enumerate(stream):
                reader.read += token.text
                if number == count:
                    raise error

        try:
            read(stream)
        except (Failure, KeyboardInterrupt):
            stream.close()  # which the exception held so far
        reader.settled()

    def program_fails(self, reader: Reader) -> None:
        """At any of its calls, those for the prompt included; or Ctrl-C arrives in it."""
        if not self.open(reader):
            return
        calls = self.rng.randint(0, 9)
        interrupt = self.rng.random() < 0.5

        def fail() -> None:
            nonlocal calls
            calls -= 1
            if calls < 0 and interrupt:
                signal.raise_signal(signal.SIGINT)
            elif calls < 0:
                raise Failure

        self.engine.program.before = fail
        try:
            while not self.take(reader, 1):
                pass
        except (Failure, KeyboardInterrupt):
            reader.settled()
        self.engine.program.before = lambda: None

    def stop(self, reader: Reader) -> None:
        if not self.open(reader):
            reader.session.stop()  # what is not running cannot be stopped
        elif not self.take(reader, self.rng.randint(0, 4)):
            reader.session.stop()
            assert self.take(reader, 1)

    def reopen(self, reader: Reader) -> None:
        """As after a restart; the old session is closed, or only its answer is dropped."""
        if self.rng.random() < 0.5:
            reader.session.close()
        if reader.stream is not None:
            reader.stream = None
            reader.settled()
        reader.session = self.begin(reader.name)

    def interrupt_keeping(self, reader: Reader) -> None:
        """Ctrl-C arrives while the answer is being kept."""
        if not self.open(reader) or self.take(reader, self.rng.randint(0, 4)):
            return
        prefixes = reader.session._prefixes
        assert prefixes is not None
        keep, names = prefixes.keep, prefixes.names
        which = self.rng.choice(("keep", "names"))

        def interrupted(*arguments: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return {"keep": keep, "names": names}[which](*arguments)

        setattr(prefixes, which, interrupted)
        try:
            reader.stream.close()
        except KeyboardInterrupt:
            assert reader.read
        setattr(prefixes, which, {"keep": keep, "names": names}[which])
        reader.settled()


OPERATION = (
    Trial.ask_whole, Trial.ask_whole, Trial.leave_named, Trial.leave_named, Trial.go_on, Trial.drop,
    Trial.close, Trial.close_session, Trial.reader_fails, Trial.program_fails, Trial.program_fails,
    Trial.stop, Trial.reopen, Trial.interrupt_keeping)


@pytest.mark.parametrize("count", [
    pytest.param(200, marks=pytest.mark.slow),
    pytest.param(
        2000, marks=[pytest.mark.campaign, pytest.mark.slow, pytest.mark.timeout(3600)]),
])
def test_random_interleavings_lose_and_double_nothing(
    fresh: Fresh, space: Namespace, count: int
) -> None:
    print("seed", SEED)
    for number in range(count):
        trial = Trial(fresh, space, SEED + number)
        try:
            trial.run()
        except BaseException:
            print("interleaving", number, trial.done)
            raise
        space.shred()
