"""Several conversations get on in one worker, and outlive it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cloister import open_vault, reference
from cloister.audit.notebook import Trail
from cloister.errors import (
    AnswerIncomplete,
    BundleError,
    CloisterError,
    ConstraintError,
    ContextExceeded,
    EmptyPrompt,
    EngineBusy,
    ProtocolError,
    SettingError,
    WorkerError,
)
from cloister.message import Message
from cloister.runtime import protocol
from cloister.runtime.chat import Ask, Sampling, Token
from cloister.runtime.client import Worker, WorkerSession
from cloister.vault.namespace import Kind

LONG: dict[str, Any] = {"max_tokens": 700, "sampling": Sampling(temperature=9.0, seed=1)}
NANO = reference.bundle_path("nano-1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One vault for the module: each test has conversations of its own names."""
    monkeypatch.setenv("CLOISTER_HOME", str(home))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def shared() -> Iterator[Worker]:
    """A worker that the tests share; whichever ends it leaves the next one to start another."""
    worker = Worker(NANO, threads=1)
    yield worker
    worker.close()


@pytest.fixture
def worker(shared: Worker) -> Worker:
    return shared.start()


def child(worker: Worker) -> subprocess.Popen[bytes]:
    return worker.ready()._child


def kill(worker: Worker) -> None:
    process = worker.ready()
    process._child.kill()
    assert process.dead.wait(20)


def texts(session: WorkerSession) -> list[str]:
    return [message.content for message in session.messages if message.role == "user"]


def test_a_conversation_is_what_a_session_of_this_process_would_be(worker: Worker) -> None:
    from cloister.runtime.engine import Engine
    from cloister.runtime.session import Session

    near, far = Session(Engine(NANO, threads=1), system="call"), worker.session(system="call")
    for prompt in ("play some jazz", "will it rain in Rome"):
        one, two = [list(chat.stream(prompt, top=2, max_tokens=12)) for chat in (near, far)]
        assert [(token.id, token.text) for token in one] == [
            (token.id, token.text) for token in two]
        assert [token.top[1][0] for token in one] == [token.top[1][0] for token in two]
        assert far.messages == near.messages
        assert (far.stats.tokens, far.stats.finish) == (near.stats.tokens, near.stats.finish)
    assert far.stats.peak_rss_bytes > 0
    answer = far.ask("book a table", choices=["yes", "no"])
    assert answer == far.messages[-1] == near.ask("book a table", choices=["yes", "no"])


def test_conversations_from_several_threads_wait_for_each_other_and_never_mix(
    worker: Worker
) -> None:
    prompts = [f"play number {number} by {name}" for number, name in enumerate(("A", "Bee", "Cy"))]

    def ask(prompt: str) -> str:
        return worker.session(system="call").ask(prompt, max_tokens=24).content

    wanted, got = [ask(prompt) for prompt in prompts], [list[str]() for _ in prompts]
    threads = [
        threading.Thread(target=lambda answers=answers, prompt=prompt: answers.extend(
            ask(prompt) for _ in range(4)))
        for answers, prompt in zip(got, prompts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[answer] * 4 for answer in wanted]
    assert len(set(wanted)) == 3


def test_a_question_that_waits_can_be_stopped_before_it_begins(worker: Worker) -> None:
    first, second = worker.session(), worker.session()
    running = first.stream("hi", **LONG)
    next(running)
    waiting = second.stream("and I?", **LONG)
    second.stop()
    first.stop()
    assert list(waiting) == []
    assert second.messages == []
    assert second.stats.finish == "stop"
    list(running)
    assert first.stats.finish == "stop"
    assert second.ask("now?", max_tokens=2).content


def test_a_stop_from_another_thread_ends_an_answer_that_is_being_read(worker: Worker) -> None:
    session = worker.session()
    stream = session.stream("hi", **LONG)
    seen = [next(stream).text]
    threading.Thread(target=session.stop).start()
    seen += [token.text for token in stream]
    assert session.stats.finish == "stop"
    assert session.messages[1].content == "".join(seen)


def test_an_interrupted_answer_does_not_leak_into_the_next(worker: Worker) -> None:
    session = worker.session(name="interrupted")

    def read() -> None:
        for _ in session.stream("hi", **LONG):
            raise KeyboardInterrupt  # as Ctrl-C does, while the client waits for a token

    with pytest.raises(KeyboardInterrupt):
        read()
    assert len(list(session.stream("play jazz", max_tokens=2))) == 2
    assert texts(session) == ["hi", "play jazz"]
    assert worker.session(name="interrupted").messages == session.messages


def test_a_stream_left_by_break_is_kept_at_the_next_question(worker: Worker) -> None:
    session = worker.session(name="left")
    stream = session.stream("hi", **LONG)
    read = next(stream).text + next(stream).text
    assert session.messages == []
    session.ask("play jazz", max_tokens=2)
    session.ask("play more", max_tokens=2)
    assert list(stream) == []
    del stream
    assert texts(session) == ["hi", "play jazz", "play more"]
    assert session.messages[1].content.startswith(read)  # what came before it could be told
    assert worker.session(name="left").messages == session.messages


@pytest.mark.parametrize(("prompt", "options", "error"), [
    ("fox " * 3000, {}, ContextExceeded), ("", {}, EmptyPrompt), ([], {}, EmptyPrompt),
    ("hi", {"top": -1}, SettingError), ("hi", {"top": 10**6}, SettingError),
    ("hi", {"max_tokens": 0}, SettingError), ("hi", {"schema": {"type": "x"}}, ConstraintError),
    ("hi", {"schema": {"enum": [object()]}}, ProtocolError),
    ("hi", {"choices": []}, ConstraintError), ("x" * (65 << 20), {}, ProtocolError),
    ("\ud800", {}, CloisterError), ("hi", {"max_tokens": "5"}, SettingError),
], ids=range(12))
def test_what_is_refused_is_refused_by_its_own_name_and_the_conversation_goes_on(
    worker: Worker, prompt: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    before = child(worker)
    session = worker.session(system="call")
    with pytest.raises(error) as caught:
        list(session.stream(prompt, **options))
    assert "fox" not in str(caught.value)
    assert len(session.messages) == 1
    assert session.ask("play jazz", max_tokens=2).content
    assert child(worker) is before


def test_a_refused_first_prompt_does_not_fix_the_system_prompt(worker: Worker) -> None:
    with pytest.raises(ContextExceeded):
        worker.session(system="call", name="refused").ask("fox " * 3000)
    assert worker.session(system="intent", name="refused").ask("hi", max_tokens=2)


def test_an_answer_cut_off_before_its_constraint_is_met_is_named_and_kept(
    worker: Worker
) -> None:
    session = worker.session(name="cut off")
    seen: list[str] = []
    with pytest.raises(AnswerIncomplete):
        for token in session.stream("hi", max_tokens=3, schema={"type": "string", "minLength": 90}):
            seen.append(token.text)
    assert session.messages[1:] == [Message(role="assistant", content="".join(seen))]
    assert worker.session(name="cut off").messages == session.messages


def test_a_conversation_that_ended_with_its_bundle_says_so(worker: Worker) -> None:
    session = worker.session()
    session.ask("hi", max_tokens=2)
    worker.load(NANO, threads=1)
    with pytest.raises(ProtocolError, match="begin it first"):
        session.ask("hi", max_tokens=2)
    assert worker.session().ask("hi", max_tokens=2)
    with pytest.raises(BundleError):
        worker.load("nowhere.cloister")
    assert worker.load(NANO, threads=1).context > 0


def test_another_thread_cannot_ask_into_an_answer(worker: Worker) -> None:
    session = worker.session()
    stream = session.stream("hi", **LONG)
    next(stream)
    process = child(worker)
    process.send_signal(signal.SIGSTOP)  # so that the reader waits
    reader = threading.Thread(target=lambda: list(stream))
    try:
        reader.start()
        while not session._turns[0]._tokens.gi_running:  # type: ignore[attr-defined]
            time.sleep(0.001)
        with pytest.raises(EngineBusy):
            session.stream("and I?")
    finally:
        process.send_signal(signal.SIGCONT)
    session.stop()
    reader.join()
    assert texts(session) == ["hi"]


def test_a_worker_that_died_is_named_and_the_next_question_begins_another_with_its_bundle(
    worker: Worker
) -> None:
    kept, other = worker.session(name="died", system="call"), worker.session(system="call")
    kept.ask("play jazz", max_tokens=4)
    other.ask("play folk", max_tokens=4)
    model = worker.loaded
    stream = kept.stream("hi", **LONG)
    read = next(stream).text
    before = child(worker)
    before.kill()
    with pytest.raises(WorkerError, match="ended without an answer"):
        for token in stream:
            read += token.text
    assert kept.ask("play blues", max_tokens=4).content
    assert child(worker) is not before
    assert worker.loaded is not None and model is not None
    assert worker.loaded.model_id == model.model_id
    assert other.ask("play ska", max_tokens=4).content
    assert texts(kept) == ["play jazz", "hi", "play blues"]
    assert kept.messages[4].content == read
    assert texts(other) == ["play folk", "play ska"]
    assert worker.session(name="died").messages == kept.messages


def test_an_answer_is_made_again_and_a_conversation_forgotten(worker: Worker) -> None:
    session = worker.session(name="again", system="call")
    session.ask("play jazz", max_tokens=4)
    session.ask("play folk", max_tokens=4)
    list(session.answer(Ask.of("play ska", max_tokens=4, after=3)))
    assert texts(session) == ["play jazz", "play ska"]
    assert worker.session(name="again").messages == session.messages
    said = session.messages
    stream = session.answer(Ask.of("play blues", after=1, **LONG))
    next(stream)
    child(worker).kill()
    with pytest.raises(WorkerError):
        list(stream)
    assert session.messages == said  # until there is another answer
    session.ask("play soul", max_tokens=4)
    assert texts(session) == ["play jazz", "play ska", "play soul"]
    session.forget()
    assert session.messages == worker.session(name="again", system="call").messages == said[:1]
    session.ask("play jazz", max_tokens=4)
    assert session.messages[:3] == said[:3]


def test_texts_are_found_by_the_fingerprints_that_a_worker_records(worker: Worker) -> None:
    text = "the seven lighthouses of the zanzibar ferry company"
    worker.record([text], namespace="lab")
    with open_vault() as vault:
        trail = Trail(vault.namespace("lab"), Kind.HISTORY)
        assert trail.fingerprints.of(text) and trail.fingerprints.of(text) <= trail.known
    with pytest.raises(SettingError, match="without a vault"):
        Worker(NANO, vault=False).record([text])


@pytest.mark.slow
def test_start_and_close_may_come_twice_and_a_conversation_outlives_both() -> None:
    worker = Worker(NANO, threads=1)
    worker.close()
    assert worker.start() is worker
    before = child(worker)
    assert child(worker.start()) is before
    session = worker.session()
    session.ask("play jazz", max_tokens=3)
    worker.close()
    worker.close()
    assert before.poll() == 0
    assert "not running" in repr(worker)
    session.ask("play folk", max_tokens=3)  # starts another
    assert texts(session) == ["play jazz", "play folk"]
    with worker as same:
        assert same is worker
    assert "not running" in repr(worker)


@pytest.mark.slow
def test_closing_keeps_what_is_unfinished(worker: Worker) -> None:
    session = worker.session(name="unfinished")
    stream = session.stream("hi", **LONG)
    read = next(stream).text
    worker.close()
    again = worker.session(name="unfinished")
    assert texts(again) == ["hi"]
    assert again.messages[1].content.startswith(read)
    with suppress(WorkerError):
        list(stream)
    session.ask("play jazz", max_tokens=2)
    assert texts(session) == ["hi", "play jazz"]
    assert worker.session(name="unfinished").messages == session.messages


def test_a_prompt_is_in_no_argument_and_no_variable_of_the_worker(worker: Worker) -> None:
    stream: Any = worker.session().stream("a most private request", **LONG)
    next(stream)
    process = Path(f"/proc/{child(worker).pid}")
    for name in ("cmdline", "environ"):
        with suppress(PermissionError):  # better still
            assert b"private request" not in (process / name).read_bytes()
    stream.close()


@pytest.mark.slow
def test_only_events_reach_the_client_nothing_its_standard_error_and_it_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from cloister.runtime.client import Worker\n"
        f"with Worker({str(NANO)!r}) as worker:\n"
        "    session = worker.session(system='call', name='lean')\n"
        "    print(len(list(session.stream('play a song', max_tokens=3))))\n"
        "    session.ask('play', choices=['yes'])\n"
        "heavy = {'torch', 'executorch', 'llguidance', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert run.stderr == b""
    assert run.stdout == b"3\n"


SEED = 7
EACH = 4  # conversations in one worker


@pytest.mark.slow
@pytest.mark.parametrize("count", [
    8, pytest.param(200, marks=[pytest.mark.campaign, pytest.mark.timeout(3600)])])
def test_a_worker_killed_at_random_loses_no_conversation(home: Path, count: int) -> None:
    """Half of them are kept under a name; all go on, with every question and answer they had."""
    print("seed", SEED)
    rng = random.Random(SEED)
    worker = Worker(NANO, threads=1).start()
    for number in range(0, count, EACH):
        _survive(worker, rng, f"killed, {number} of {count}")
    worker.close()


def _survive(worker: Worker, rng: random.Random, name: str) -> None:
    """Kill the worker once, while some of its conversations are being answered or wait."""
    names = [f"{name}, {each}" if each % 2 else None for each in range(EACH)]
    sessions = [worker.session(system="call", name=name) for name in names]
    questions = [[f"first {each}"] for each in range(EACH)]
    for session, (question,) in zip(sessions, questions, strict=True):
        session.ask(question, max_tokens=rng.randint(1, 5))
    heard = [""] * EACH

    def ask(each: int, count: int) -> None:
        with suppress(WorkerError):
            for token in sessions[each].stream(
                f"second {each}", max_tokens=count, sampling=Sampling(temperature=9.0, seed=each)
            ):
                heard[each] += token.text

    threads = [
        threading.Thread(target=ask, args=(each, rng.choice((5, 40, 300))))
        for each in range(EACH)]
    for thread in threads:
        thread.start()
    time.sleep(rng.choice((0.0, 0.002, 0.01, 0.05, 0.2)) * rng.random())
    killed = child(worker)
    killed.kill()
    for thread in threads:
        thread.join()
    killed.wait()
    for each, session in enumerate(sessions):
        session.ask("third", max_tokens=3)
        asked = texts(session)
        assert asked in (
            [f"first {each}", f"second {each}", "third"],
            [f"first {each}", "third"] if not heard[each] else None)
        if heard[each]:
            assert session.messages[4].content.startswith(heard[each])
        assert [message.role for message in session.messages[1:]] == (
            ["user", "assistant"] * len(asked))
        if names[each] is not None:
            assert worker.session(name=names[each]).messages == session.messages


@pytest.mark.slow
def test_a_dead_worker_is_noticed_whatever_it_was_doing(worker: Worker) -> None:
    session = worker.session(name="anything")
    deaths: list[Callable[[], object]] = [
        lambda: session.ask("hi", max_tokens=2), lambda: worker.session(),
        lambda: worker.load(NANO, threads=1), session.close, session.stop]
    for act in deaths:
        kill(worker)
        act()
    assert session.ask("play jazz", max_tokens=2).content
    assert set(texts(session)) <= {"hi", "play jazz"}


@pytest.mark.parametrize("options", [
    {"choices": [1, 2]}, {"choices": "abc"}, {"tools": ["x"]}, {"grammar": 5}, {"schema": [1]},
    {"max_tokens": True}, {"schema": {"a": object()}},
])
def test_a_value_of_another_type_is_refused_before_it_is_sent(
    worker: Worker, options: dict[str, Any]
) -> None:
    session = worker.session()
    with pytest.raises(CloisterError):
        list(session.stream("hi", **options))
    assert session.ask("hi", max_tokens=2).content


def test_a_schema_nested_too_deeply_is_refused_and_the_worker_lives(worker: Worker) -> None:
    schema: dict[str, Any] = {}
    for _ in range(900):
        schema = {"items": schema}
    session = worker.session()
    with pytest.raises(CloisterError):
        session.ask("hi", schema=schema)
    assert session.ask("hi", max_tokens=2).content


def test_what_waits_ends_at_once_and_costs_the_running_answer_nothing(worker: Worker) -> None:
    first, second, third = worker.session(), worker.session(), worker.session()
    running = first.stream("hi", **LONG)
    next(running)
    waiting = second.stream("and I?", **LONG)
    began = time.perf_counter()
    waiting.close()
    third.close()
    assert time.perf_counter() - began < 5
    first.stop()
    assert list(running) is not None
    assert first.stats.finish == "stop"
    assert second.messages == []


def test_a_system_message_within_a_conversation_outlives_the_worker(worker: Worker) -> None:
    session = worker.session(system="call")
    session.ask("play jazz", max_tokens=3)
    session.ask([Message(role="system", content="intent"), Message(role="user", content="and?")],
                max_tokens=3)
    before = session.messages
    kill(worker)
    session.ask("play blues", max_tokens=3)
    assert session.messages[:len(before)] == before
    assert [message.role for message in before].count("system") == 2


def test_a_passphrase_or_a_text_is_in_no_repr_of_the_protocol() -> None:
    for record in (
        protocol.Unlock(id=1, passphrase="hunter2"),
        protocol.Begin(id=1, chat=1, system="hunter2", name="hunter2"),
        protocol.Produced(id=1, token=Token(1, "hunter2", 0.0)),
    ):
        assert "hunter2" not in repr(record)


@pytest.mark.slow
def test_a_worker_without_a_vault_is_refused_local_services_and_keeps_nothing() -> None:
    with Worker(NANO, threads=1, vault=False) as worker:
        assert worker.session().ask("hi", max_tokens=2).content
        if worker.guard_tier == 2:
            assert worker.ready().welcome.evidence["local services"] == "refused"
        with pytest.raises(SettingError, match="without a vault"):
            worker.session(name="kept")


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["nano-1", "pro"])
def test_the_scores_of_an_answer_under_its_own_model_are_those_that_it_was_given_with(
    tier: str
) -> None:
    """To the bit, where neither process had read anything."""
    with Worker(reference.bundle_path(tier), threads=1, vault=False) as worker:
        said = list(worker.session(system="call").stream("wake me up at eight", top=5))
        assert len(said) > 4 and {token.rank for token in said} == {1}
        worker.load(reference.bundle_path(tier), threads=1)
        session = worker.session(system="call")
        assert list(session.answer(Ask.of(
            "wake me up at eight", top=5, forced=tuple(token.id for token in said),
            max_tokens=len(said)))) == said
        assert session.stats.forced_tokens == len(said) == session.stats.tokens
        session = worker.session()
        running = session.answer(Ask.of("hi", forced=(5,) * 200, max_tokens=200))
        next(running)
        session.stop()
        assert len(list(running)) < 199 and session.stats.finish == "stop"


def test_a_process_tries_to_reach_out_and_tells_that_it_was_refused() -> None:
    with Worker(vault=False) as worker:
        attempts = worker.probe()
        assert len(attempts) == 6
        assert [each.name for each in attempts if not each.refused] == []
        assert all(each.how.startswith("refused") for each in attempts)
        assert worker.welcome.guard_tier == 2 and worker.running
    assert not worker.running


def test_a_worker_that_is_dropped_leaves_no_process_behind() -> None:
    worker = Worker(NANO, threads=1).start()
    process = child(worker)
    del worker
    assert process.wait(timeout=20) == 0
