"""A grid that is asked on a thread of its own, and tells how far it is and what comes out."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from cloister.errors import SettingError, named
from cloister.runtime.chat import Sampling
from cloister_jupyter.cases import Case, blocks, seeds
from cloister_jupyter.checks import Judge, parse
from cloister_jupyter.grid import Grid, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from cloister.runtime.client import Worker
    from cloister_jupyter.checks import Check
    from cloister_jupyter.kept import Answer, Kept

__all__ = ["Form", "GridRun", "Means"]

_PROGRESS_S = 0.25
_RESULT_S = 2.0
_SHARE = 20  # a result may take one part in so many of the time


class Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a grid is asked, as its user wrote it. Its repr shows no text."""

    templates: str = ""
    system: str = ""
    check: str = ""  # of cases that have none
    seeds: str = ""
    temperature: float = 0.0
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 64
    wanted: float = 0.9  # share of the cases

    def __repr__(self) -> str:
        return "Form()"

    def plan(self, cases: Iterable[Case]) -> Plan:
        """Return what is asked.

        Raises:
            SettingError, DataError, InvalidText: see `Plan`, `blocks` and `seeds`; or the wanted
                share is none.
        """
        if not 0 < self.wanted < 1:
            raise SettingError("The wanted pass rate is above 0 and below 100 %; give another.")
        if not self.templates.strip():
            raise SettingError("There is no prompt; type a template first.")
        return Plan(
            prompts=blocks(self.templates), cases=tuple(cases) or (Case(line=1, values={}),),
            seeds=seeds(self.seeds), system=self.system or None, max_tokens=self.max_tokens,
            sampling=Sampling(temperature=self.temperature))

    def default_check(self) -> Check | None:
        """Return the check of cases that have none.

        Raises:
            SettingError: see `cloister_jupyter.checks.parse`.
        """
        return parse(self.check) if self.check.strip() else None


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a run asks, and what it asks with."""

    tiers: Mapping[str, Path]
    functions: Mapping[str, Callable[[str, Case], bool]]
    kept: Callable[[], Kept]  # called on the run's thread
    record: Callable[[Iterable[str]], object]
    worker: Callable[[str | Path], Worker] | None = None


class GridRun:
    """A run; `grid` is there as soon as what is asked is found right."""

    def __init__(
        self, run: str, form: Form, cases: tuple[Case, ...], means: Means,
        tell: Callable[..., None],
    ) -> None:
        """Take what is asked; `tell` is called with a kind of message and its values."""
        self.run, self.form, self._cases, self._means, self._tell = run, form, cases, means, tell
        self.grid: Grid | None = None
        self.running = True  # whoever hears of the end may begin the next run at once
        self.variables = tuple(dict.fromkeys(name for case in cases for name in case.values))
        self.heard = 0  # answers
        self._stopping = threading.Event()
        self._asked, self._began_s = 0, 0.0  # answers that were not kept before, and since when
        self._told_s, self._next_s = 0.0, 0.0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def begin(self) -> None:
        """Begin, on a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End within a token; see `Grid.stop`."""
        self._stopping.set()
        if self.grid is not None:
            self.grid.stop()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; whether it came."""
        self._thread.join(timeout_s)
        return not self.running

    @property
    def total(self) -> int:
        """The number of answers that there will be; 0 while it is not known."""
        return 0 if self.grid is None else len(self.grid.plan) * len(self.grid.tiers)

    def result(self) -> dict[str, Any]:
        """Return the pass rates of each prompt, and what they say."""
        grid = self.grid
        if grid is None:
            return {}
        rows = grid.rows()
        return {
            "run": self.run, "done": self._done(), "total": self.total, "heard": self.heard,
            "prompts": [self._rates(prompt) for prompt in range(len(grid.plan.prompts))],
            "differing": sum(row.differs for row in rows),
            "failing": sum(row.fails for row in rows),
            "reasons": dict(grid.reasons)}

    def _rates(self, prompt: int) -> dict[str, Any]:
        assert self.grid is not None
        verdict = self.grid.verdict(self.form.wanted, prompt)
        judged = {name: rate for name, rate in self.grid.rates(prompt).items() if rate.n}
        return {
            "verdict": verdict.text if judged else "", "tier": verdict.tier,
            "settled": verdict.settled,
            "rates": [{
                "name": name, "passed": rate.passed, "n": rate.n, "value": rate.value,
                "low": rate.interval[0], "high": rate.interval[1], "words": str(rate),
            } for name, rate in judged.items()]}

    def _serve(self) -> None:
        message = ""
        try:
            self._ask()
        except Exception as error:
            message = str(named(error, "The grid"))
        finally:
            self.running = False
            self._tell("over", run=self.run, stopped=self._stopping.is_set(), message=message,
                       result=self.result())

    def _ask(self) -> None:
        means, form = self._means, self.form
        plan = form.plan(self._cases)
        with Judge(functions=means.functions, default=form.default_check()) as judge:
            grid = Grid(plan, means.tiers, judge=judge, kept=means.kept(), record=means.record,
                        worker=means.worker)
            self.grid = grid
            if self._stopping.is_set():  # it came before there was a grid to stop
                grid.stop()
            self._tell("began", run=self.run, total=self.total, prompts=len(plan.prompts),
                       cases=len(plan.cases), variables=self.variables,
                       columns=list(means.tiers))
            for answer in grid.run(self._progress):
                self._note(answer)

    def _note(self, answer: Answer) -> None:
        self.heard += 1
        self._asked += not answer.kept
        now = time.monotonic()
        if now >= self._next_s:
            self._tell("result", **self.result())
            took_s = time.monotonic() - now
            self._next_s = now + max(_RESULT_S, _SHARE * took_s)

    def _progress(self, stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        now = time.monotonic()
        if note or not self._began_s:
            self._began_s = self._began_s or now
        if note or done == total or now - self._told_s >= _PROGRESS_S:
            self._told_s = now
            self._tell("progress", run=self.run, tier=stage, done=self._done(), total=self.total,
                       note=note, left_s=self._left_s(now), heard=self.heard)

    def _done(self) -> int:
        return 0 if self.grid is None else sum(map(len, self.grid.answers.values()))

    def _left_s(self, now: float) -> float | None:
        """Return for how long it will go on, where answers take as long as those before did."""
        if not self._asked:
            return None
        return (self.total - self._done()) * (now - self._began_s) / self._asked
