"""A grid is asked whole, stops anywhere, and goes on from what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloister import reference
from cloister.errors import (
    BundleError,
    ContextExceeded,
    DataError,
    SettingError,
    VaultDamaged,
    WorkerError,
)
from cloister.message import Message
from cloister.runtime.chat import Ask, Chat, Sampling, Stats, Token
from cloister.runtime.client import Worker
from cloister.runtime.prompt import Count
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.namespace import Kind, Namespace
from cloister_jupyter.cases import Case, Template, read_table
from cloister_jupyter.checks import Judge
from cloister_jupyter.grid import Grid, Plan, fold
from cloister_jupyter.kept import Answer, Kept
from cloister_jupyter.request import LIMIT_BYTES

Say = Callable[[str, Sampling], Iterator[str]]


class FakeChat(Chat):
    """Says what `say` makes of the prompt, until it is stopped."""

    def __init__(self, say: Say, asked: list[str]) -> None:
        super().__init__()
        self._say, self._asked, self._stop = say, asked, threading.Event()

    @property
    def messages(self) -> list[Message]:
        return []

    def stop(self) -> None:
        self._stop.set()

    def forget(self) -> None:
        raise NotImplementedError

    def count(self, prompt: Any, *, tools: Any = None) -> Count:
        return Count(text=len(prompt))

    def _formats(self) -> None:
        """It takes text only."""

    def _answer(self, ask: Ask) -> Any:
        self._asked.append(ask.messages[-1].content)
        self.stats = Stats()

        def tokens() -> Generator[Token]:
            for number, text in enumerate(self._say(ask.messages[-1].content, ask.sampling)):
                if self._stop.is_set():
                    return
                self.stats.tokens += 1
                yield Token(number, text, 0.0)
            self.stats.finish = "end"

        return lambda: (tokens(), lambda read: None)


class FakeWorker:
    """A process that there is not."""

    def __init__(self, say: Say, model: str = "0" * 64, fails: Exception | None = None) -> None:
        self.say, self.fails, self.asked = say, fails, list[str]()
        self.loaded = SimpleNamespace(model_id=model)
        self.running, self.closed = False, 0

    def start(self) -> FakeWorker:
        if self.fails is not None:
            raise self.fails
        self.running = True
        return self

    def close(self) -> None:
        self.running, self.closed = False, self.closed + 1

    def session(self, *, system: str | None = None) -> FakeChat:
        return FakeChat(self.say, self.asked)


def echo(prompt: str, sampling: Sampling) -> Iterator[str]:
    yield from (prompt, "!")


def plan(count: int = 3, **options: Any) -> Plan:
    cases = tuple(Case(line=n + 2, values={"x": str(n)}, expected=f"say {n}!")
                  for n in range(count))
    return Plan(prompts=(Template("say {x}"),), cases=cases, **options)


def grid(workers: dict[str, FakeWorker], plan_: Plan | None = None, **options: Any) -> Grid:
    return Grid(plan_ or plan(), {name: name for name in workers},
                worker=lambda name: workers[str(name)], **options)  # type: ignore[arg-type, return-value]


@pytest.fixture
def space() -> Iterator[Namespace]:
    settings = Settings.from_environment()
    with local.open_vault(settings=settings, create=True, notify=lambda notice: None) as vault:
        yield vault.namespace()


def test_every_tier_is_asked_everything_and_one_runs_at_a_time() -> None:
    workers = {name: FakeWorker(echo) for name in ("nano-1", "pro")}
    seen, said = [], grid(workers)
    for answer in said.run(lambda stage, done=0, total=0, note="": seen.append((stage, done))):
        assert [name for name, worker in workers.items() if worker.running] == [answer.tier]
    assert [answer.text for answer in said.answers["pro"].values()] == [
        "say 0!", "say 1!", "say 2!"]
    assert seen == [(name, n) for name in workers for n in (0, 0, 1, 2, 3)]
    assert not said.stopped and not workers["pro"].running
    assert [row.differs for row in said.rows()] == [False] * 3


def test_a_tier_that_cannot_be_asked_says_why_and_the_others_go_on() -> None:
    workers = {"gone": FakeWorker(echo, fails=BundleError("No bundle is there; name another.")),
               "pro": FakeWorker(echo)}
    said = grid(workers)
    assert len(list(said.run())) == 3
    assert said.reasons == {"gone": "No bundle is there; name another."}


def test_a_process_that_dies_fails_its_answer_and_after_two_its_tier() -> None:
    def dies(prompt: str, sampling: Sampling) -> Iterator[str]:
        yield "sa"
        if prompt in bad:
            raise WorkerError("gone")

    bad = {"say 1", "say 3"}
    said = grid({"one": FakeWorker(dies), "two": FakeWorker(echo)}, plan(6), judge=Judge())
    assert [each.error for each in said.run() if each.tier == "one"] == [
        "", "WorkerError", "", "WorkerError", "", ""]
    assert said.rates()["one"].n == 4 and not said.reasons
    bad = {"say 2", "say 3"}
    said = grid({"one": FakeWorker(dies), "two": FakeWorker(echo)}, plan(6))
    assert len([each for each in said.run() if each.tier == "one"]) == 4
    assert "died twice" in said.reasons["one"] and len(said.answers["two"]) == 6
    bad = set()
    assert [each.place[1] for each in said.run()] == [2, 3, 4, 5]  # what failed is asked again


def test_a_prompt_that_does_not_fit_is_an_answer_that_does_not_pass() -> None:
    def short(prompt: str, sampling: Sampling) -> Iterator[str]:
        if prompt == "say 2":
            raise ContextExceeded("too long")
        yield from echo(prompt, sampling)

    said = grid({"one": FakeWorker(short)}, judge=Judge())
    assert [(each.error, each.outcome and each.outcome.passed) for each in said.run()] == [
        ("", True), ("", True), ("ContextExceeded", False)]
    rate = said.rates()["one"]
    assert (rate.passed, rate.n) == (2, 3)
    assert not said.verdict(0.9).settled


def test_stop_ends_the_run_within_a_token_and_what_is_not_whole_is_dropped(
    space: Namespace
) -> None:
    def slow(prompt: str, sampling: Sampling) -> Iterator[str]:
        for n in range(5000 if prompt == "say 2" else 1):  # 10 s
            time.sleep(0.002)
            yield f"{n} "

    kept = Kept(space, "g")
    said = grid({"one": FakeWorker(slow), "two": FakeWorker(slow)}, kept=kept)
    answers = []
    for answer in said.run():
        answers.append(answer)
        if answer.place[1] == 1:
            stop = threading.Timer(0.1, said.stop)
            stop.start()
            begin = time.monotonic()
    assert time.monotonic() - begin < 5
    assert said.stopped and [each.place[1] for each in answers] == [0, 1]
    assert len(kept) == len(Kept(space, "g")) == 2
    again = grid({"one": FakeWorker(echo), "two": FakeWorker(echo)}, kept=Kept(space, "g"))
    answers = list(again.run())
    assert [(each.tier, each.place[1], each.kept) for each in answers] == [
        ("one", 0, True), ("one", 1, True), ("one", 2, False),
        ("two", 0, True), ("two", 1, True), ("two", 2, True)]  # of the same model


def test_stop_waits_for_no_check(space: Namespace) -> None:
    """A function cannot be killed, and goes on behind; a search can."""
    held, called = threading.Event(), threading.Event()

    def hangs(answer: str, case: Case) -> bool:
        called.set()
        return held.wait(60)

    for check in ("function: hangs", "regex: ^(a+)+$"):
        cases = tuple(Case(line=n, values={"x": "a" * 50 + str(n)}, check=check) for n in (2, 3))
        with Judge(functions={"hangs": hangs}, limit_s=60, function_limit_s=60) as judge:
            said = grid(
                {"one": FakeWorker(echo)}, Plan(prompts=(Template("{x}"),), cases=cases),
                judge=judge, kept=Kept(space, check[:3]))
            threading.Timer(1.0, said.stop).start()
            begin = time.monotonic()
            assert list(said.run()) == []
            assert time.monotonic() - begin < 5 and said.stopped and not said.rows()
            assert len(Kept(space, check[:3])) == 1  # and is judged when the run goes on
    assert called.is_set()
    held.set()


def test_stop_while_a_tier_is_loaded_returns_at_once_and_its_process_ends_behind() -> None:
    class Slow(FakeWorker):
        def start(self) -> FakeWorker:
            time.sleep(4)
            return super().start()

    worker = Slow(echo)
    said = grid({"one": worker, "two": worker})
    threading.Timer(0.1, said.stop).start()
    begin = time.monotonic()
    assert list(said.run()) == []
    assert time.monotonic() - begin < 3 and said.stopped and not said.reasons
    while not worker.closed and time.monotonic() - begin < 60:
        time.sleep(0.1)
    assert not worker.running and worker.closed == 1


def test_dropping_the_run_ends_the_process() -> None:
    worker = FakeWorker(echo)
    run = grid({"one": worker}).run()
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert not worker.running and len(worker.asked) == 1


def test_a_thousand_cases_that_were_killed_in_the_middle_go_on_from_what_is_kept(
    tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent("""
        import sys
        from tests.unit.jupyter.test_grid import FakeWorker, echo, grid, plan
        from cloister.vault.local import open_vault
        from cloister_jupyter.kept import Kept
        worker = FakeWorker(echo)
        with open_vault(create=True, notify=lambda notice: None) as vault:
            said = grid({"one": worker}, plan(1000), kept=Kept(vault.namespace(), "g"))
            for answer in said.run():
                print(answer.kept, flush=True)
    """))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parents[3]), *sys.path])}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        heard = [process.stdout.readline() for _ in range(400)]
        process.send_signal(signal.SIGKILL)
        heard += process.stdout.readlines()
    assert heard == [b"False\n"] * len(heard) and 400 <= len(heard) < 1000
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    kept = done.stdout.split().count(b"True")
    assert len(done.stdout.split()) == 1000
    assert kept - len(heard) in (0, 1)  # one may have been on the disk and not yet heard of


@pytest.mark.parametrize("change", [
    {"system": "other"}, {"max_tokens": 9}, {"seeds": (7,)},
    {"sampling": Sampling(temperature=1.0)}, {"prompts": (Template("say  {x}"),)}])
def test_other_inputs_are_never_answered_from_what_is_kept(
    space: Namespace, change: dict[str, Any]
) -> None:
    list(grid({"one": FakeWorker(echo)}, kept=Kept(space, "g")).run())
    base = {"prompts": (Template("say {x}"),), "cases": plan().cases}
    again = grid({"one": FakeWorker(echo)}, Plan(**{**base, **change}), kept=Kept(space, "g"))
    assert [each.kept for each in again.run()] == [False] * 3


def test_another_model_is_never_answered_for(space: Namespace) -> None:
    list(grid({"one": FakeWorker(echo)}, kept=Kept(space, "g")).run())
    again = grid({"one": FakeWorker(echo, model="1" * 64)}, kept=Kept(space, "g"))
    assert [each.kept for each in again.run()] == [False] * 3


def test_what_failed_is_not_kept_and_what_is_kept_can_be_forgotten(space: Namespace) -> None:
    def fails(prompt: str, sampling: Sampling) -> Iterator[str]:
        raise ContextExceeded("too long")
        yield

    kept = Kept(space, "g")
    list(grid({"one": FakeWorker(fails)}, kept=kept).run())
    assert len(kept) == 0 and not kept.forget()
    list(grid({"one": FakeWorker(echo)}, kept=kept).run())
    assert len(kept) == 3 and kept.forget() and len(Kept(space, "g")) == 0
    for name in ("", "x" * 257):
        with pytest.raises(SettingError):
            Kept(space, name)
    space.put(Kind.HISTORY, b"\xfflab grid old", b'["another format"]')
    with pytest.raises(VaultDamaged, match="another release"):
        Kept(space, "old")


def test_an_edited_table_asks_only_what_is_new(space: Namespace) -> None:
    worker = FakeWorker(echo)
    list(grid({"one": worker}, plan(3), kept=Kept(space, "g")).run())
    list(grid({"one": worker}, plan(5), kept=Kept(space, "g")).run())
    assert worker.asked == [f"say {n}" for n in range(5)]


def test_seeds_fold_into_distinct_answers_with_counts() -> None:
    def draws(prompt: str, sampling: Sampling) -> Iterator[str]:
        yield "even " if (sampling.seed or 0) % 2 == 0 else "odd"

    def other(prompt: str, sampling: Sampling) -> Iterator[str]:
        yield "odd" if prompt == "say 0" else "even"

    seeded = plan(2, seeds=(1, 2, 3), sampling=Sampling(temperature=1.0))
    said = grid({"one": FakeWorker(draws), "two": FakeWorker(other)}, seeded)
    list(said.run())
    first, second = said.rows()
    assert fold(first.answers["one"]) == [("odd", 2), ("even", 1)]
    assert fold(second.answers["two"]) == [("even", 3)]
    assert said.rows(differing=True) == [first, second]


def test_only_whole_rows_that_differ_are_shown() -> None:
    def shouts(prompt: str, sampling: Sampling) -> Iterator[str]:
        yield prompt + ("!!" if prompt == "say 1" else "!\n")

    said = grid({"one": FakeWorker(echo), "two": FakeWorker(shouts)})
    list(said.run())
    assert [row.case for row in said.rows(differing=True)] == [1]
    assert len(said.rows()) == 3


def test_two_bundles_are_compared_by_the_cases_that_flip_and_the_table_has_every_answer() -> None:
    def only(good: str) -> Say:
        return lambda prompt, sampling: iter((prompt, "!" if good in prompt else "?"))

    said = grid({"old": FakeWorker(only("0")), "new": FakeWorker(only("1"))}, judge=Judge())
    list(said.run())
    broken, mended, judged = said.flips("old", "new")
    assert ([row.case for row in broken], [row.case for row in mended], judged) == ([0], [1], 3)
    assert said.flips("old", "none") == ([], [], 0)
    table = said.table()
    assert [(each["tier"], each["line"], each["passed"]) for each in table][:4] == [
        ("old", 2, True), ("old", 3, False), ("old", 4, False), ("new", 2, False)]
    assert table[0]["asked"] == "say 0" and table[0]["answer"] == table[0]["expected"] == "say 0!"
    assert len({tuple(each) for each in table}) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"prompts": ()}, "at least"), ({"cases": ()}, "at least"), ({"seeds": ()}, "at least"),
    ({"seeds": (1, 2)}, "temperature 0"),
    ({"seeds": (1, 1), "sampling": Sampling(temperature=1.0)}, "twice"), ({"seeds": (-1,)}, "seed"),
    ({"cases": (Case(line=4, values={"x": "y" * 70_000}),)}, f"line 4 .* {LIMIT_BYTES:,}"),
    ({"seeds": tuple(range(300_000)), "sampling": Sampling(temperature=1.0)}, "300,000"),
])
def test_a_plan_that_cannot_be_asked_is_refused(options: dict[str, Any], message: str) -> None:
    base = {"prompts": (Template("say {x}"),), "cases": plan(1).cases}
    with pytest.raises(SettingError, match=message):
        Plan(**{**base, **options})


def test_what_is_wrong_with_a_case_is_said_before_anything_is_asked() -> None:
    cases = read_table("x,check\n1,\n2,like: y\n")
    with pytest.raises(DataError, match="variable town"):
        Plan(prompts=(Template("{x} {town}"),), cases=cases)
    with pytest.raises(SettingError, match="line 3"):
        grid({"one": FakeWorker(echo)}, Plan(prompts=(Template("{x}"),), cases=cases),
             judge=Judge())
    with pytest.raises(SettingError, match="needs a tier"):
        Grid(plan(), {})


def test_every_text_is_recorded_before_anybody_hears_it() -> None:
    recorded: set[str] = set()
    said = grid({"one": FakeWorker(echo)}, plan(system="the system"), record=recorded.update)
    for answer in said.run():
        assert {answer.text, "say 2", "the system"} <= recorded


def test_no_repr_shows_a_text() -> None:
    answer = Answer(tier="one", place=(0, 0, None), text="secret")
    shown = repr((plan(), Plan(prompts=(Template("secret"),), system="secret"), answer))
    assert "secret" not in shown and "say" not in shown


def test_nothing_here_brings_torch_into_the_kernel() -> None:
    names = ("cases", "checks", "grid", "rates", "receipt", "regression", "votes")
    code = "\n".join(f"import cloister_jupyter.{name}" for name in names)
    subprocess.run([sys.executable, "-c", f"{code}\nimport sys; assert 'torch' not in sys.modules"],
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


@pytest.mark.slow
def test_real_tiers_are_asked_and_go_on_from_what_is_kept(
    space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cases = read_table("city,check\n" + "".join(
        f'{name},"{{""json"": {{""name"": ""GetWeather""}}}}"\n'
        for name in ("Paris", "Rome", "Oslo")))
    asked = Plan(prompts=(Template("what is the weather in {city}"),), cases=cases,
                 system="call", max_tokens=60)
    tiers = {"nano-2": reference.bundle_path("nano-2"), "gone": Path("none.cloister"),
             "nano-1": reference.bundle_path("nano-1")}
    with Judge() as judge:
        said = Grid(asked, tiers, judge=judge, kept=Kept(space, "g"))
        for answer in said.run():
            if answer.tier == "nano-1" and answer.place[1] == 1:
                said.stop()
        assert said.stopped and "gone" in said.reasons
        again = Grid(asked, tiers, judge=judge, kept=Kept(space, "g"))
        answers = list(again.run())
        assert [each.kept for each in answers] == [True] * 5 + [False]
        assert json.loads(answers[0].text)["name"] == "GetWeather" and answers[5].tokens > 5
        assert list(again.rates()) == ["nano-1", "nano-2", "gone"]
        assert (again.rates()["nano-2"].passed, again.verdict(0.9).settled) == (3, False)


@pytest.mark.slow
def test_a_real_process_that_is_killed_costs_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made: list[Worker] = []

    def worker(bundle: str | Path) -> Worker:
        made.append(Worker(bundle, vault=False))
        return made[-1]

    said = Grid(Plan(prompts=(Template("say {x}"),), cases=plan(4).cases, max_tokens=20),
                {"nano-1": reference.bundle_path("nano-1")}, worker=worker)
    for answer in said.run():
        if answer.place[1] == 1:
            made[0].ready()._child.kill()
    errors = [each.error for each in said.answers["nano-1"].values()]
    assert len(errors) == 4 and len(made) == 1 and not said.reasons
    assert [each for each in errors if each] in ([], ["WorkerError"])


@pytest.mark.slow
def test_a_real_answer_is_stopped_within_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = Plan(
        prompts=(Template("tell a story about {x}"),), cases=plan(9).cases, system="story",
        sampling=Sampling(temperature=9.0), seeds=(1,), max_tokens=700)
    said = Grid(asked, {"nano-1": reference.bundle_path("nano-1")})
    called: list[float] = []

    def stop() -> None:
        called.append(time.monotonic())
        said.stop()

    run = said.run()
    first = next(run)
    threading.Timer(0.2, stop).start()  # an answer takes some seconds
    for answer in run:
        assert answer.finish
    took_s = time.monotonic() - called[0]
    assert first.tokens > 100 and said.stopped and len(said.rows()) < 9
    assert took_s < 1  # 4 to 8 ms where nothing else runs
