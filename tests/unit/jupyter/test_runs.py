"""One request goes to several bundles, one after the other, and is told as events in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister import family
from cloister.errors import EmptyPrompt, EngineBusy, InvalidText, PromptError, SettingError
from cloister.runtime.chat import Sampling, Stats
from cloister.runtime.client import Worker
from cloister_jupyter.answers import Run
from cloister_jupyter.column import Column, columns_of
from cloister_jupyter.events import Began, Delta, Ended, Event, Over, Ready, Refused, Waits
from cloister_jupyter.request import LIMIT_BYTES, Request
from cloister_jupyter.runs import Runs

NANO = family.bundle_path("nano-1")
LONG: dict[str, Any] = {"max_tokens": 900, "sampling": Sampling(temperature=9.0, seed=1)}


class Heard:
    """What was told, and a way to wait for some of it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def of(self, kind: type[Any], column: str | None = None) -> list[Any]:
        return [event for event in list(self.events) if isinstance(event, kind)
                and (column is None or event.column == column)]

    def wait(self, met: Callable[[], Any]) -> None:
        with self._changed:
            assert self._changed.wait_for(met, 60)

    def text(self, column: str) -> str:
        return "".join(text for event in self.of(Delta, column) for text in event.texts)


def columns(*paths: Path) -> list[Column]:
    return [Column(id=str(index), name=f"c{index}", path=path) for index, path in enumerate(paths)]


def asked(*ids: str, run: str = "r", **changes: Any) -> Request:
    return Request(**{
        "run": run, "columns": ids, "prompt": "wake me up at eight", "system": "call", **changes})


@pytest.fixture(scope="module")
def shared() -> Iterator[Runs]:
    """Two columns that the tests share: their processes take seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        runs = Runs(columns(NANO, NANO), lambda event: None)
        yield runs
        runs.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def two(shared: Runs, heard: Heard) -> Iterator[Runs]:
    shared._tell = heard
    yield shared
    shared.stop()  # what a test left going on is not the next one's
    assert shared.wait(60)


@pytest.fixture
def cold(two: Runs) -> Runs:
    """The same, no process running."""
    two.close()
    return two


def test_columns_answer_one_after_the_other_each_with_its_figures(
    cold: Runs, heard: Heard
) -> None:
    cold.begin(asked("0", "1"))
    assert cold.wait(60)
    kinds = [type(event) for event in heard.events if not isinstance(event, Delta)]
    assert kinds == [Began, Ready, Ended, Began, Ready, Ended, Over]
    assert [event.seq for event in heard.events] == list(range(len(heard.events)))
    with Worker(NANO, vault=False) as worker:
        text = worker.session(system="call").ask("wake me up at eight").content
    for id_ in "01":
        assert heard.text(id_) == text
        (ended,) = heard.of(Ended, id_)
        assert ended.finish == "end" and ended.tokens > 2 and ended.prompt_tokens > 5
        assert 0 < ended.ttft_s < 30 and ended.tokens_per_s > 1
        assert ended.bundle_bytes == sum(file.stat().st_size for file in NANO.iterdir()
                                         if file.name != "manifest.json")
        assert ended.peak_rss_bytes > ended.bundle_bytes
        assert heard.of(Ready, id_)[0].load_s > 0
    assert set(cold.welcomes) == {"0", "1"}


def test_a_second_run_finds_the_processes_warm(cold: Runs, heard: Heard) -> None:
    for run in ("a", "b"):
        cold.begin(asked("0", run=run))
        assert cold.wait(60)
    first, second = heard.of(Ready)
    assert first.load_s is not None and second.load_s is None


def test_stop_ends_the_answer_and_begins_no_other(two: Runs, heard: Heard) -> None:
    two.begin(asked("0", "1", **LONG))
    heard.wait(lambda: heard.of(Delta))
    two.stop("another run")  # which a page that is late may still ask for
    assert two.running
    began = time.perf_counter()
    two.stop("r")
    assert two.wait(10)
    assert time.perf_counter() - began < 2
    (ended,) = heard.of(Ended)
    assert ended.finish == "stop" and ended.column == "0" and 0 < ended.tokens < 900
    assert heard.of(Began, "1") == []
    assert heard.of(Over)[0].stopped
    two.begin(asked("1"))
    assert two.wait(60) and heard.of(Ended, "1")


def test_stop_while_a_bundle_is_loaded_does_not_wait_for_it(cold: Runs, heard: Heard) -> None:
    cold.begin(asked("0", "1"))
    heard.wait(lambda: heard.of(Began))
    cold.stop()
    assert cold.wait(1)
    assert heard.of(Ended) == [] and heard.of(Over)[0].stopped
    cold.begin(asked("0"))
    assert cold.wait(60) and heard.of(Ended)


def test_one_that_is_stopped_before_its_first_token_has_not_answered(
    two: Runs, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> Stats:
        """Hear the stop before the first token comes."""
        two.stop()
        return Stats(finish="stop")

    monkeypatch.setattr(Run, "read", read)
    two.begin(asked("0", "1"))
    assert two.wait(60)
    assert heard.of(Ended) == heard.of(Delta) == [] and heard.of(Over)[0].stopped


def test_stop_asked_twice_ends_a_process_that_does_not_listen(two: Runs, heard: Heard) -> None:
    two.begin(asked("0", "1", **LONG))
    heard.wait(lambda: heard.of(Delta))
    os.kill(two._workers["0"].ready().pid, signal.SIGSTOP)
    two.stop()
    assert not two.wait(0.5)
    two.stop()
    assert two.wait(20)
    assert heard.of(Refused, "0") and not heard.of(Began, "1")
    two.begin(asked("0"))
    assert two.wait(60) and heard.of(Ended, "0")


def test_tokens_go_out_in_batches(two: Runs, heard: Heard) -> None:
    two.begin(asked("0", **LONG))
    assert two.wait(60)
    (ended,) = heard.of(Ended)
    deltas = heard.of(Delta)
    assert len(deltas) < ended.tokens / 2 or ended.tokens_per_s < 60
    assert sum(len(event.texts) for event in deltas) <= ended.tokens


def test_a_bundle_that_is_refused_is_its_own_columns_error(
    heard: Heard, tmp_path: Path
) -> None:
    (tmp_path / "empty.cloister").mkdir()
    runs = Runs(columns(tmp_path / "none.cloister", tmp_path / "empty.cloister", NANO), heard)
    runs.begin(asked("0", "1", "2"))
    assert runs.wait(60)
    runs.close()
    assert [event.column for event in heard.of(Refused)] == ["0", "1"]
    assert all(event.message.endswith(".") for event in heard.of(Refused))
    assert heard.of(Ended, "2")


def test_a_worker_that_dies_is_its_own_columns_error_and_is_begun_anew(
    two: Runs, heard: Heard
) -> None:
    two.begin(asked("0", "1", **LONG))
    heard.wait(lambda: heard.of(Delta, "0"))
    two._workers["0"].ready()._child.kill()
    heard.wait(lambda: heard.of(Delta, "1"))
    two.stop()
    assert two.wait(10)
    (refused,) = heard.of(Refused)
    assert refused.column == "0" and refused.kind == "WorkerError" and heard.text("0")
    two.begin(asked("0", run="again"))
    assert two.wait(60)
    assert heard.of(Ended, "0")[0].finish == "end"
    assert heard.of(Ready, "0")[-1].load_s is not None  # cold again, and says so


def test_a_prompt_over_the_context_is_refused_by_the_column_with_both_numbers(
    two: Runs, heard: Heard
) -> None:
    two.begin(asked("0", prompt="word " * 3000))
    assert two.wait(60)
    (refused,) = heard.of(Refused)
    assert refused.kind == "ContextExceeded" and "3,0" not in refused.message
    assert sum(character.isdigit() for character in refused.message) >= 6


def test_a_run_beside_a_run_is_refused_and_another_lab_waits_for_it(
    two: Runs, heard: Heard
) -> None:
    other = Heard()
    second = Runs(columns(NANO), other)
    two.begin(asked("0", **LONG))
    heard.wait(lambda: heard.of(Delta))
    with pytest.raises(EngineBusy):
        two.begin(asked("0"))
    second.begin(asked("0"))
    other.wait(lambda: other.of(Waits))
    assert not other.of(Began)
    two.stop()
    assert two.wait(10) and second.wait(60)
    assert other.of(Ended)
    two.begin(asked("0", run="x", **LONG))
    heard.wait(lambda: [event for event in heard.of(Delta) if event.run == "x"])
    second.begin(asked("0", run="y"))
    second.stop()
    assert second.wait(5) and other.of(Over)[-1].stopped
    second.close()


def test_processes_that_nobody_asks_give_their_memory_back(heard: Heard) -> None:
    runs = Runs(columns(NANO), heard, warm_s=0.5)
    for run in ("a", "b"):
        runs.begin(asked("0", run=run))
        assert runs.wait(60)
        deadline = time.monotonic() + 20
        while "not running" not in repr(runs._workers["0"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert all(ready.load_s is not None for ready in heard.of(Ready))
    runs.close()


def test_requests_out_of_bounds_are_refused_with_both_numbers_and_never_shown() -> None:
    with pytest.raises(PromptError, match=r"100,000 bytes .* 65,536"):
        asked("0", prompt="x" * 100_000)
    with pytest.raises(PromptError, match="system prompt"):
        asked("0", system="\u00e9" * (LIMIT_BYTES // 2 + 1))
    with pytest.raises(EmptyPrompt):
        asked("0", prompt="")
    with pytest.raises(InvalidText):
        asked("0", prompt="\ud800")
    for bad in ({"max_tokens": 0}, {"max_tokens": True}, {"prompt": 5}):
        with pytest.raises(SettingError):
            asked("0", **bad)
    with pytest.raises(SettingError):
        asked()
    with pytest.raises(SettingError):
        Runs(columns(NANO), lambda event: None).begin(asked("7"))
    request = asked("0", prompt="secret words", system="secret task")
    assert "secret" not in repr(request)
    assert "secret" not in repr(Delta(run="r", seq=0, column="0", texts=("secret",)))


def test_columns_are_the_tiers_and_the_bundles_that_are_named(tmp_path: Path) -> None:
    assert [column.name for column in columns_of()] == ["ultra", "pro", "nano-2", "nano-1"]
    found = columns_of(["nano-1"], [tmp_path / "a" / "x.cloister", tmp_path / "b" / "x.cloister"])
    assert [column.name for column in found] == ["nano-1", "a/x", "b/x"]
    assert [column.id for column in found] == ["0", "1", "2"]
    for bad in ((["nano-9"],), ([],), ("nano-1",)):
        with pytest.raises(SettingError):
            columns_of(*bad)


def test_the_notebooks_process_needs_no_torch() -> None:
    code = ("import sys, cloister_jupyter; cloister_jupyter.PromptLab(['nano-1']); "
            "print([name for name in ('torch', 'executorch', 'transformers') "
            "if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
