"""One request to several bundles, one after the other, told as a stream of events.

Each bundle has a worker process of its own, which stays warm between runs. A run has a thread of
its own, so that the kernel stays free; what it has to say goes to `tell`, in order, from that
thread and from the one that sends tokens in batches. No torch, no vault: nothing is kept.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloister.bundle import Bundle
from cloister.errors import CloisterError, EngineBusy, SettingError, named
from cloister.runtime.client import Worker
from cloister_jupyter.answers import Answer, Run
from cloister_jupyter.background import BATCH_S, WARM_S, Idle, every
from cloister_jupyter.events import (
    Began,
    Branched,
    Ended,
    Event,
    Over,
    Ready,
    Refused,
    Resumed,
    Unscored,
    Waits,
)
from cloister_jupyter.turn import TURN, start, take_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloister.guard import Attempt
    from cloister.runtime.chat import Token
    from cloister.runtime.protocol import Welcome
    from cloister_jupyter.column import Column
    from cloister_jupyter.request import Request

__all__ = ["Probed", "Runs"]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What processes found when they tried to reach out."""

    at: str  # time of day
    attempts: dict[str, tuple[Attempt, ...]]  # by name of the process
    failed: tuple[str, ...] = ()  # sentences of those that could not try


class Runs:
    """Requests to some bundles, one at a time; see the module."""

    def __init__(
        self, columns: Sequence[Column], tell: Callable[[Event], None], *,
        warm_s: float = WARM_S,
    ) -> None:
        """Tell of every run to `tell`; end processes that were not asked for `warm_s`."""
        self.columns = {column.id: column for column in columns}
        self._tell, self._warm_s = tell, warm_s
        self._idle = Idle(warm_s, self._cool)
        self._workers = self._new_workers()
        self._lock = threading.RLock()  # of the run
        self._run: Run | None = None
        self.last: Run | None = None  # the one that goes on, or went on last
        self._thread: threading.Thread | None = None
        self.welcomes: dict[str, Welcome] = {}
        """How each process that was started guards itself, by column."""

    def __repr__(self) -> str:
        return f"Runs({', '.join(column.name for column in self.columns.values())})"

    @property
    def running(self) -> bool:
        """Whether a run is going on."""
        return self._run is not None

    @property
    def request(self) -> Request | None:
        """What the last run asks."""
        return None if self.last is None else self.last.request

    def begin(self, request: Request) -> None:
        """Begin to answer, on a thread of its own.

        Raises:
            EngineBusy: a run is going on.
            SettingError: it asks a column that there is not.
        """
        if not set(request.columns) <= set(self.columns):
            raise SettingError("The request names a tier that this lab has not; choose another.")
        self._go(Run(request, self._tell), self._answer_all)

    def score(self, run: str) -> None:
        """Tell how likely the tokens of the last run are, of lower columns by the highest's model.

        Raises:
            EngineBusy: a run is going on.
            SettingError: there is no such run any more.
        """
        self._go(self._again(run), self._score_all)

    def branch(self, run: str, parent: str, at: int, id_: int) -> None:
        """Go on from an answer of the last run with the token `id_` in place of its number `at`.

        Raises:
            EngineBusy: a run is going on.
            SettingError: there is no such run any more, or no such token.
        """
        last = self._again(run)
        answer = last.answers.get(parent)
        if answer is None or not 0 <= at < len(answer.tokens) or id_ < 0:
            raise SettingError("There is no such token to leave the answer at; choose another.")
        forced = (*(token.id for token in answer.tokens[:at]), id_)

        def work(run: Run) -> None:
            run.tell(Resumed, scores=False)
            number = sum(other.startswith(f"{answer.column}.") for other in run.answers)
            branch = f"{answer.column}.{number}"
            run.tell(Branched, column=branch, parent=parent, at=at)
            self._ask(run, branch, forced)

        self._go(last, work)

    def likeliest(self, run: str, column: str, start: int, stop: int) -> list[
            tuple[Token, Token | None]]:
        """Tokens of an answer as they were given, and as the highest column's model scores them.

        Raises:
            SettingError: there is no such run any more, or no such answer.
        """
        answer = self._again(run).answers.get(column)
        if answer is None:
            raise SettingError("That answer is no longer there; run it again.")
        scores = answer.scores[:stop]
        return [(token, scores[number] if number < len(scores) else None)
                for number, token in enumerate(answer.tokens[:stop])][max(0, start):]

    def probe(self, told: Callable[[Probed], None]) -> None:
        """Let each running process try to reach out, on a thread; where none runs, a bare one."""
        running = {self.columns[id_].name: worker for id_, worker in self._workers.items()
                   if worker.running}

        def work() -> None:
            bare = Worker(vault=False)
            attempts: dict[str, tuple[Attempt, ...]] = {}
            failed: list[str] = []
            for name, worker in (running or {"one that was started for this": bare}).items():
                try:
                    attempts[name] = worker.probe()
                except CloisterError as error:
                    failed.append(f"{name}: {error}")
            bare.close()
            told(Probed(at=time.strftime("%H:%M:%S"), attempts=attempts, failed=tuple(failed)))

        threading.Thread(target=work, daemon=True).start()

    def stop(self, run: str | None = None) -> None:
        """End the run within a token; only the one called `run`, where one is named."""
        current = self._run
        if current is not None and run in (None, current.request.run):
            current.stop()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the run; whether it came."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return not self.running

    def close(self) -> None:
        """Stop, and end the processes."""
        self.stop()
        self.wait(10)
        self._idle.cancel()
        for worker in self._workers.values():
            worker.close()

    def _new_workers(self) -> dict[str, Worker]:
        """Make workers, whose processes start when they are first asked.

        Without a vault nothing can be kept, and local services are refused to the process, too.
        """
        return {id_: Worker(column.path, vault=False) for id_, column in self.columns.items()}

    def _cool(self) -> None:
        """End the processes, unless a run is on: its end will see to them."""
        with self._lock:
            if self._run is not None:
                return
            warm, self._workers = self._workers, self._new_workers()
        for worker in warm.values():
            worker.close()

    def _again(self, run: str) -> Run:
        if self.last is None or self.last.request.run != run:
            raise SettingError("Those answers are no longer there; run the request again.")
        return self.last

    def _go(self, run: Run, work: Callable[[Run], None]) -> None:
        with self._lock:
            if self._run is not None:
                raise EngineBusy("A run is going on; stop it first.")
            self._run = self.last = run
            run.stopping.clear()
        self._thread = threading.Thread(target=self._serve, args=(run, work), daemon=True)
        self._thread.start()

    def _serve(self, run: Run, work: Callable[[Run], None]) -> None:
        try:
            with every(BATCH_S, run.flush_batch):
                if self._take_turn(run):
                    try:
                        work(run)
                    finally:
                        TURN.release()
        finally:
            with self._lock:  # whoever hears of the end may begin the next run at once
                self._run = None
                self._idle.begin()
                run.tell(Over, stopped=run.stopping.is_set())

    def _take_turn(self, run: Run) -> bool:
        """Wait until nobody else of this process asks; False where stopped before that."""
        if TURN.acquire(blocking=False):
            return True
        run.tell(Waits)
        return take_turn(run.stopping)

    def _answer_all(self, run: Run) -> None:
        for id_ in run.request.columns:
            if not run.stopping.is_set():
                self._ask(run, id_)

    def _ask(self, run: Run, id_: str, forced: tuple[int, ...] = ()) -> None:
        """Let a column answer; `id_` is its own, or a branch's."""
        answer = run.answers[id_] = Answer(id_.partition(".")[0])
        _told(lambda: self._ask_or_raise(run, id_, self.columns[answer.column], forced),
              lambda kind, message: run.tell(Refused, column=id_, kind=kind, message=message))

    def _ask_or_raise(
        self, run: Run, id_: str, column: Column, forced: tuple[int, ...]
    ) -> None:
        run.tell(Began, column=id_)
        size = Bundle.open(column.path).manifest.size_bytes
        worker = self._workers[column.id]
        before = worker.loaded
        if not self._start(column, run):
            return
        loaded = worker.loaded
        cold = loaded is not None and loaded is not before
        run.tell(Ready, column=id_, load_s=loaded.load_s if cold and loaded else None)
        stats = run.read(
            worker, run.request.ask(forced=forced), lambda token: run.add(id_, token))
        if not stats.tokens and run.stopping.is_set():
            return  # as one that had not begun
        run.tell(
            Ended, column=id_, finish=stats.finish, prompt_tokens=stats.prompt_tokens,
            tokens=stats.tokens, forced_tokens=stats.forced_tokens, ttft_s=stats.ttft_s,
            tokens_per_s=stats.decode_tokens_per_s, peak_rss_bytes=stats.peak_rss_bytes,
            bundle_bytes=size)

    def _score_all(self, run: Run) -> None:
        run.tell(Resumed, scores=True)
        for id_, answer in run.answers.items():
            run.tell_scores(id_, answer.column, answer.told, answer.tokens[answer.told:])
            answer.told = len(answer.tokens)
        by = run.reference
        for id_, answer in run.answers.items():
            whole = len(answer.scores) == len(answer.tokens)
            if by is not None and not (whole or answer.column == by or run.stopping.is_set()):
                self._score(run, id_, self.columns[by])

    def _score(self, run: Run, id_: str, by: Column) -> None:
        own = self.columns[run.answers[id_].column]

        def unscored(_kind: str, message: str) -> None:
            run.tell(Unscored, column=id_, by=by.id, message=message)

        def score() -> None:
            if _tokenizer(own) != _tokenizer(by):
                unscored("", f"{by.name} has another tokenizer than {own.name} and cannot score "
                         f"its tokens; the figures are {own.name}'s own.")
            elif self._start(by, run):
                run.score(id_, self._workers[by.id], by.id)

        _told(score, unscored)

    def _start(self, column: Column, run: Run) -> bool:
        """Start a column's worker, its bundle loaded; False where the run was stopped before that.

        What is being loaded goes on behind, and is warm for the next run. Where memory is short the
        other workers give theirs first.
        """
        worker = self._workers[column.id]

        def free() -> None:
            for other in self._workers.values():
                if other is not worker:
                    other.close()

        if start(worker, run.stopping, free) is not None:
            return False
        self.welcomes[column.id] = worker.welcome
        return True


def _told(work: Callable[[], None], tell: Callable[[str, str], None]) -> None:
    """Work, and tell of an error by its kind and words; of one that is not ours by its place."""
    try:
        work()
    except Exception as error:
        ours = named(error, "The lab")
        tell(type(ours).__name__, str(ours))


def _tokenizer(column: Column) -> str:
    return Bundle.open(column.path).manifest.files["tokenizer.json"].sha256
