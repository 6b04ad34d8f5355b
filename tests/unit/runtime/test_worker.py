"""The worker answers what it was asked, survives what it refuses, and never outlives its client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cloister import reference
from cloister.errors import ContextExceeded, SettingError
from cloister.runtime.client import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG: dict[str, Any] = {"max_tokens": 900, "sampling": {"temperature": 9.0, "seed": 1}}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Worker() as worker:
        worker.load(reference.bundle_path("nano-1"))
        yield worker


def test_an_interrupted_answer_does_not_leak_into_the_next(worker: Worker) -> None:
    stream = worker.stream("hi", **LONG)
    next(stream)
    with pytest.raises(KeyboardInterrupt):  # as Ctrl-C does, while the client waits for a token
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert worker.stats["finish"] == "stop"
    assert len(list(worker.stream("play jazz", max_tokens=2))) == 2


def test_ctrl_c_at_the_terminal_reaches_the_client_alone(worker: Worker) -> None:
    stream = worker.stream("hi", **LONG)
    next(stream)
    os.kill(worker._process.pid, signal.SIGINT)  # the terminal sends it to the whole group
    worker.stop()
    list(stream)
    assert len(list(worker.stream("play jazz", max_tokens=2))) == 2


def test_a_refused_first_prompt_does_not_fix_the_system_prompt(worker: Worker) -> None:
    with pytest.raises(ContextExceeded):
        list(worker.stream("fox " * 3000, system="call"))
    with pytest.raises(SettingError, match="top"):
        list(worker.stream("hi", system="call", top=-1))
    assert list(worker.stream("hi", system="intent", max_tokens=2))


def test_an_unknown_sampling_setting_is_refused_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(SettingError, match="sampling"):
        list(worker.stream("hi", sampling={"temprature": 1.0}))
    assert list(worker.stream("hi", max_tokens=2))


@pytest.mark.parametrize("line", [b'{"do": "ask", "prom', b"\xff\n", b"[]\n", b"{}\n"])
def test_a_client_that_dies_or_raves_leaves_no_worker_behind(line: bytes) -> None:
    worker = Worker()
    with worker:
        assert worker._process.stdin is not None
        worker._process.stdin.write(line)
        worker._process.stdin.close()
        worker._process.wait(timeout=20)


def test_the_worker_imports_nothing_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("open('imported', 'w').close()")
    monkeypatch.chdir(tmp_path)
    with Worker() as worker:
        time.sleep(0.1)
        assert worker._process.stdin is not None
        worker._process.stdin.close()
        worker._process.wait(timeout=20)
    assert not (tmp_path / "imported").exists()


def test_a_prompt_is_in_no_argument_and_no_variable_of_the_worker(worker: Worker) -> None:
    stream = worker.stream("a most private request", **LONG)
    next(stream)
    process = Path(f"/proc/{worker._process.pid}")
    for name in ("cmdline", "environ"):
        assert b"private request" not in (process / name).read_bytes()
    stream.close()  # type: ignore[attr-defined]


def test_only_events_reach_the_client_and_nothing_its_standard_error() -> None:
    code = (
        "from cloister.runtime.client import Worker; from cloister import reference\n"
        "with Worker() as w:\n"
        "    w.load(reference.bundle_path('nano-1'))\n"
        "    print(len(list(w.stream('play a song', system='call', max_tokens=3))))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert run.stdout == b"3\n"
    assert run.stderr == b""
