"""The worker answers what it was asked, survives what it refuses, and never outlives its client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.unit.runtime.conftest import FakeEngine

from cloister import reference
from cloister.errors import NotEnoughDisk
from cloister.message import Message
from cloister.runtime import protocol
from cloister.runtime.chat import Ask, Sampling
from cloister.runtime.protocol import LIMIT_BYTES
from cloister.runtime.worker import Service
from cloister.vault.namespace import Namespace

SECRET = "a most private word"
Fresh = Callable[..., FakeEngine]


def question(id_: int, text: str = "the fox", chat: int = 1, **options: Any) -> protocol.Question:
    return protocol.Question(id=id_, chat=chat, ask=Ask.of(text, **options))


class Served:
    """A service in this process, on a fake engine, and what it sent."""

    def __init__(self, engine: FakeEngine) -> None:
        self.events: list[Any] = []
        self.service = Service(self.events.append)
        self.service._engine = engine  # as `Load` would, of a program that is none
        self.engine = engine

    def __call__(self, request: protocol.Request) -> Any:
        """Serve a request; the event that ends it."""
        self.events.clear()
        self.service.handle(request)
        assert all(isinstance(event, protocol.Produced) for event in self.events[:-1])
        return self.events[-1]


@pytest.fixture
def served(fresh: Fresh) -> Iterator[Served]:
    made = Served(fresh())
    yield made
    made.service._vault = None  # it is the tests'
    made.service.close()


def test_a_question_is_answered_with_tokens_and_what_is_kept_of_them(served: Served) -> None:
    begun = served(protocol.Begin(id=1, chat=1, system="call"))
    assert begun == protocol.Begun(
        id=1, messages=(Message(role="system", content="call"),), restored_tokens=0)
    answered = served(question(2, max_tokens=4))
    text = "".join(event.token.text for event in served.events[:-1])
    assert answered.kept == (
        Message(role="user", content="the fox"), Message(role="assistant", content=text))
    assert answered.stats.tokens == len(served.events) - 1 == 4
    assert served(protocol.End(id=3, chat=1)) == protocol.Ended(id=3)
    assert served(protocol.End(id=4, chat=1)) == protocol.Ended(id=4)


@pytest.mark.parametrize(("request_", "kind", "match"), [
    (question(5), "ProtocolError", "does not know that conversation"),
    (protocol.Hello(), "ProtocolError", "greeted twice"),
    (protocol.Begin(id=5, chat=1, name="work"), "WorkerError", "No vault is open"),
    (protocol.Begin(id=5, chat=1, cached=True), "WorkerError", "No vault is open"),
    (protocol.Load(id=5, bundle="nowhere.cloister"), "BundleError", "nowhere"),
    (protocol.Forget(id=5, chat=7), "ProtocolError", "does not know that conversation"),
    (protocol.Record(id=5, texts=("a",)), "WorkerError", "No vault is open"),
], ids=range(7))
def test_what_cannot_be_done_is_an_error_of_its_own_kind(
    served: Served, request_: Any, kind: str, match: str
) -> None:
    failed = served(request_)
    assert isinstance(failed, protocol.Failed)
    assert failed.id == getattr(request_, "id", None)
    assert (failed.kind, match in failed.message) == (kind, True)


def test_without_a_bundle_no_conversation_begins() -> None:
    events: list[Any] = []
    Service(events.append).handle(protocol.Begin(id=1, chat=1))
    assert (events[0].kind, "No bundle is loaded" in events[0].message) == ("WorkerError", True)


def test_a_question_that_goes_back_is_told_as_what_stands_in_place_of_the_rest(
    served: Served
) -> None:
    served(protocol.Begin(id=1, chat=1, system="call"))
    first = served(question(2, max_tokens=4)).kept
    served(question(3, "jumps", max_tokens=4))
    again = served(question(4, "over", max_tokens=4, after=3))
    assert [message.content for message in again.kept[:1]] == ["over"]
    session = served.service._sessions[1]
    assert session.messages[1:] == [*first, *again.kept]
    assert served(question(5, "over", max_tokens=4, after=3)).kept == ()  # the same once more
    assert session.messages[1:] == [*first, *again.kept]
    refused = served(question(6, after=0))
    assert (refused.kind, refused.kept) == ("SettingError", ())
    assert served(protocol.Forget(id=7, chat=1)).messages == tuple(session.messages[:1])


@pytest.mark.parametrize("when", ["while it is read", "before it is begun"])
def test_a_cancelled_question_ends_and_the_next_one_is_answered(
    served: Served, when: str
) -> None:
    served(protocol.Begin(id=1, chat=1))
    if when == "before it is begun":
        served.events.clear()
        served.service.enqueue(question(2))
        served.service.cancel(2)
        (answered,) = served.events
        served.service.handle(question(2))
        assert served.events == [answered]  # once
    else:
        calls = iter(range(9))
        served.engine.program.before = lambda: next(calls) == 4 and served.service.cancel(2)
        answered = served(question(2))
        assert len(served.events) - 1 == 5
    assert answered.stats.finish == "stop"
    assert not served.service._queued | served.service._withdrawn
    served.engine.program.before = lambda: None
    served.service.cancel(2)  # over, it cannot be ended
    assert served(question(3, max_tokens=4)).stats.tokens == 4


def test_an_unexpected_error_is_told_by_type_and_place_and_without_its_text(
    served: Served
) -> None:
    served(protocol.Begin(id=1, chat=1))

    def fail() -> None:
        raise LookupError(SECRET)

    served.engine.program.before = fail
    failed = served(question(2))
    assert (failed.id, failed.kind) == (2, "WorkerError")
    assert "LookupError at test_worker.py, line " in failed.message
    assert SECRET not in failed.message
    served.engine.program.before = lambda: None
    assert served(question(3, max_tokens=2)).stats.tokens == 2


@pytest.mark.parametrize("error", [LookupError(SECRET), NotEnoughDisk("full")], ids=str)
def test_a_failed_answer_is_kept_and_told_to_the_client_as_far_as_it_came(
    served: Served, space: Namespace, error: Exception
) -> None:
    served.service._vault = space.vault
    served(protocol.Begin(id=1, chat=1, name="work"))
    calls = iter(range(99))

    def fail() -> None:
        if next(calls) == 4:
            raise error

    served.engine.program.before = fail
    failed = served(question(2))
    read = "".join(event.token.text for event in served.events[:-1])
    assert read
    served.engine.program.before = lambda: None
    kept = [*getattr(failed, "kept", ()), *served(question(3, max_tokens=2)).kept]
    again = served(protocol.Begin(id=4, chat=2, name="work"))
    assert again.messages == tuple(kept)
    assert again.messages[1] == Message(role="assistant", content=read)


# The process, driven by hand.

LONG = {"max_tokens": 900, "sampling": Sampling(temperature=9.0, seed=1)}
NANO = str(reference.bundle_path("nano-1"))


class Process:
    """A worker process, and both ends of its pipes."""

    def __init__(self, home: Path | None = None, **options: Any) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-m", "cloister.runtime.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1",
                 "CLOISTER_HOME": str(home or os.environ["CLOISTER_HOME"])})
        assert self.child.stdin is not None and self.child.stdout is not None
        self.to, self.from_ = self.child.stdin, self.child.stdout

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout, self.child.stderr):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()

    def say(self, *lines: protocol.Request | bytes) -> None:
        for line in lines:
            self.to.write(line if isinstance(line, bytes) else protocol.encode(line))
        self.to.flush()

    def hear(self) -> Any:
        line = protocol.read_line(self.from_)
        return None if line is None else protocol.decode_event(line)

    def ended(self) -> int:
        return self.child.wait(timeout=60)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A worker with a bundle; each test begins a conversation of its own in it."""
    with Process(home=tmp_path_factory.mktemp("home")) as made:
        made.say(protocol.Hello(), protocol.Load(id=1, bundle=NANO, threads=1))
        assert isinstance(made.hear(), protocol.Welcome)
        assert isinstance(made.hear(), protocol.Loaded)
        yield made


def test_lines_that_are_no_requests_are_named_and_the_worker_lives_on(process: Process) -> None:
    lines = [
        b"{}\n", b"\n", b"\xff\n", b'{"type": "question", "id": 2}\n', b"[" * 90_000 + b"\n",
        b'{"type": "cancel", "id": 1, "secret": 1}\n', b'{"type": "shred", "id": 1}\n',
        b'{"type": "question", "id": 2, "chat": 1, "ask": {"messages": []}}\n',
        b'{"type": "question", "id": 2, "chat": 1, "ask": {"messages": [{"role": "user", '
        b'"content": "x"}], "top": -1}}\n',
        b"x" * (LIMIT_BYTES + 5) + b"\n",
    ]
    writer = threading.Thread(target=process.say, args=lines)
    writer.start()
    for _ in lines:
        failed = process.hear()
        assert isinstance(failed, protocol.Failed)
        assert (failed.id, failed.kind) == (None, "ProtocolError")
    writer.join()
    process.say(question(7, chat=99), protocol.Begin(id=8, chat=8), question(
        9, "play jazz", chat=8, max_tokens=2))
    unknown = process.hear()
    assert (unknown.id, unknown.kind) == (7, "ProtocolError")
    assert [type(process.hear()).__name__ for _ in range(4)] == [
        "Begun", "Produced", "Produced", "Answered"]


def test_a_cancellation_reaches_a_question_that_is_being_answered_or_waits(
    process: Process
) -> None:
    process.say(
        protocol.Begin(id=20, chat=20), protocol.Begin(id=21, chat=21),
        question(22, chat=20, **LONG), question(23, chat=21, **LONG),
        question(24, "play jazz", chat=21, max_tokens=2))
    process.hear(), process.hear()
    assert process.hear().id == 22  # its first token
    process.say(protocol.Cancel(id=23), protocol.Cancel(id=22))
    ends = {}
    while len(ends) < 3:
        event = process.hear()
        if isinstance(event, protocol.Answered):
            ends[event.id] = event
        else:
            assert event.id != 23, "a question that was cancelled while it waited has no tokens"
    assert list(ends) == [23, 22, 24]  # what waits is ended at once
    assert [end.stats.finish for end in ends.values()][:2] == ["stop", "stop"]
    assert [bool(end.kept) for end in ends.values()] == [False, True, True]


def test_an_event_too_large_to_send_is_named_and_the_worker_lives_on(process: Process) -> None:
    """Here because the worker says of a message also what the client left out."""
    before = b'{"type":"begin","id":30,"chat":30,"messages":[{"role":"user","content":"'
    after = b'"}]}\n'
    process.say(before + b"x" * (LIMIT_BYTES - len(before + after)) + after)
    failed = process.hear()
    assert isinstance(failed, protocol.Failed)
    assert (failed.id, failed.kind, "shorten" in failed.message) == (30, "ProtocolError", True)
    process.say(protocol.End(id=31, chat=30))
    assert process.hear() == protocol.Ended(id=31)


@pytest.mark.parametrize("line", [
    protocol.encode(protocol.Hello(version=1)), b'{"do": "ask"}\n', b"\xff\n",
    protocol.encode(protocol.Begin(id=1, chat=1)), protocol.encode(question(1)),
], ids=["another version", "malformed", "no text", "a conversation", "a question"])
def test_a_client_that_does_not_greet_or_is_of_another_version_is_told_and_left(
    line: bytes
) -> None:
    with Process() as process:
        process.say(line)
        failed = process.hear()
        assert (failed.id, failed.kind) == (None, "ProtocolError")
        assert f"version {protocol.VERSION}" in failed.message
        assert process.hear() is None
        assert process.ended() == 0


def test_a_client_that_dies_or_raves_leaves_no_worker_behind() -> None:
    lines = (b"", b'{"type": "hel', b"\xff", protocol.encode(protocol.Hello()) + b'{"type": "loa')
    with ExitStack() as stack:
        processes = [stack.enter_context(Process()) for _ in lines]
        for process, line in zip(processes, lines, strict=True):
            process.say(line)
            process.to.close()
        for process in processes:
            assert process.ended() == 0
            assert process.child.stderr is not None
            assert process.child.stderr.read() == b""


@pytest.mark.slow
def test_a_client_that_dies_during_an_answer_leaves_no_worker_behind_and_loses_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path))
    with Process() as process:
        process.say(
            protocol.Hello(), protocol.Load(id=1, bundle=NANO), protocol.Unlock(id=2),
            protocol.Begin(id=3, chat=3, name="work"), question(4, chat=3, **LONG))
        heard = [process.hear() for _ in range(7)]
        text = "".join(event.token.text for event in heard[4:])
        process.to.close()
        process.from_.close()
        assert process.ended() == 0
    with Process() as process:
        process.say(
            protocol.Hello(), protocol.Load(id=1, bundle=NANO), protocol.Unlock(id=2),
            protocol.Begin(id=3, chat=3, name="work"))
        *_, begun = [process.hear() for _ in range(4)]
        assert [message.role for message in begun.messages] == ["user", "assistant"]
        assert begun.messages[1].content.startswith(text)


def test_ctrl_c_at_the_terminal_does_not_reach_the_worker(process: Process) -> None:
    """The terminal sends it to the whole group; the client cancels its request."""
    process.say(protocol.Begin(id=40, chat=40), question(41, chat=40, **LONG))
    process.hear(), process.hear()
    os.kill(process.child.pid, signal.SIGINT)
    process.say(protocol.Cancel(id=41), question(42, "play jazz", chat=40, max_tokens=2))
    ends: list[Any] = []
    while len(ends) < 2:
        event = process.hear()
        if not isinstance(event, protocol.Produced):
            ends.append(event)
    assert [(end.id, end.stats.finish) for end in ends] in (
        [(41, "stop"), (42, "length")], [(41, "stop"), (42, "end")])


def test_the_worker_imports_nothing_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("open('imported', 'w').close()")
    with Process(cwd=tmp_path) as process:
        process.say(protocol.Hello())
        assert isinstance(process.hear(), protocol.Welcome)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("line", [
    b'{"type":"begin","id":31,"chat":9,"namespace":5}',
    b'{"type":"question","id":31,"chat":9,"ask":{"messages":[{"role":"user","content":null}]}}',
    b'{"type":"question","id":31,"chat":9,"ask":{"messages":[{"role":"user","content":"x"}],'
    b'"schema":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}",
    b'{"type":"dance","id":31}',
], ids=["type", "null", "deep", "unknown"])
def test_a_request_that_cannot_be_read_is_answered_under_its_id(
    process: Process, line: bytes
) -> None:
    process.child.stdin.write(line + b"\n")
    process.child.stdin.flush()
    event = process.hear()
    assert (event.id, event.kind) == (31, "ProtocolError")
    process.say(protocol.Begin(id=32, chat=32))
    assert process.hear().id == 32  # and it lives on


def test_a_disk_that_is_full_for_one_conversation_does_not_cost_another_its_turn(
    served: Served, space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []

    class Full:
        def close(self) -> None:
            raise NotEnoughDisk("full")

    class Fine:
        def close(self) -> None:
            closed.append(1)

    served.service._sessions = {1: Full(), 2: Fine()}  # type: ignore[dict-item]
    served.service.close()
    assert closed == [1]
