"""One request to several bundles, one after the other, told as a stream of events.

Each bundle has a worker process of its own, which stays warm between runs. A run has a thread of
its own, so that the kernel stays free; what it has to say goes to `tell`, in order, from that
thread and from the one that sends tokens in batches. No torch, no vault: nothing is kept.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cloister import family
from cloister.bundle import Bundle
from cloister.errors import (
    CloisterError,
    EmptyPrompt,
    EngineBusy,
    InvalidText,
    NotEnoughMemory,
    PromptError,
    SettingError,
    place_of,
)
from cloister.runtime.chat import Sampling
from cloister.runtime.client import Worker
from cloister.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloister.runtime.chat import Stats, Token
    from cloister.runtime.client import WorkerSession
    from cloister.runtime.protocol import Welcome

__all__ = [
    "LIMIT_BYTES", "Began", "Column", "Delta", "Ended", "Event", "Over", "Ready", "Refused",
    "Request", "Runs", "Waits", "columns_of",
]

LIMIT_BYTES = 1 << 16  # of a prompt and of a system prompt, in UTF-8
_BATCH_S = 0.04  # an eye sees no steps, and a fast tier sends few messages
_LOOK_S = 0.01  # how often a wait looks whether it is to stop
_WARM_S = 600.0  # after which processes that nobody asks give their memory back


@dataclass(frozen=True, kw_only=True)
class Column:
    """A bundle that is asked, under a name for people."""

    id: str
    name: str
    path: Path


def columns_of(tiers: Sequence[str] | None = None, bundles: Sequence[str | Path] = ()) -> (
        tuple[Column, ...]):
    """Return the columns of tiers of the shipped family and of other bundles, in that order.

    `tiers` None stands for every tier that is shipped. Whether a bundle can be used is found out
    when it is asked; where two have one name, the directory that holds them tells them apart.

    Raises:
        SettingError: there is no tier of that name, or nothing to ask.
    """
    if isinstance(tiers, str) or isinstance(bundles, str | Path):
        raise SettingError("Tiers and bundles are lists; write ['nano-1'].")
    if tiers is None:
        tiers = [tier for tier in Tier if family.bundle_path(tier).is_dir()]
    for tier in tiers:
        if tier not in list(Tier):
            raise SettingError(
                f"No tier is named {str(tier)!r}; tiers are {', '.join(Tier)}, and other bundles "
                "go into bundles=[...]."
            )
    paths = [family.bundle_path(tier) for tier in tiers] + [Path(path) for path in bundles]
    if not paths:
        raise SettingError("There is nothing to ask; name a tier or a bundle.")
    names = [str(tier) for tier in tiers] + [path.name.removesuffix(".cloister")
                                            for path in paths[len(tiers):]]
    return tuple(
        Column(
            id=str(index), path=path,
            name=name if names.count(name) == 1 or index < len(tiers)
            else f"{path.absolute().parent.name}/{name}")
        for index, (name, path) in enumerate(zip(names, paths, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked, of which columns. Its repr does not show the texts.

    Raises:
        EmptyPrompt: there is no prompt.
        PromptError: a text is over LIMIT_BYTES, or no Unicode.
        SettingError: no column, or a value outside its bound.
    """

    run: str  # its id, chosen by who asks
    columns: tuple[str, ...]  # ids
    prompt: str = field(repr=False)
    system: str | None = field(default=None, repr=False)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = 256

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not isinstance(self.system, str | None):
            raise SettingError("A prompt is a text; give one.")
        if not self.prompt:
            raise EmptyPrompt("There is no prompt; type one first.")
        for name, text in (("prompt", self.prompt), ("system prompt", self.system or "")):
            try:
                size = len(text.encode())
            except UnicodeEncodeError:
                raise InvalidText(f"The {name} is not valid Unicode; type it anew.") from None
            if size > LIMIT_BYTES:
                raise PromptError(
                    f"The {name} has {size:,} bytes and the lab takes {LIMIT_BYTES:,}; shorten it.")
        if not self.columns:
            raise SettingError("No tier is chosen; choose at least one.")
        if self.max_tokens is not None and (
                type(self.max_tokens) is not int or self.max_tokens < 1):
            raise SettingError(f"max_tokens is {self.max_tokens}; it must be at least 1.")


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """`seq` counts the events of a run from 0, so that a reader sees a gap."""

    run: str
    seq: int

    def __repr__(self) -> str:  # without what was answered
        return f"{type(self).__name__}(run={self.run!r}, seq={self.seq})"


class Waits(_Event, frozen=True):
    """Another lab of this kernel is running; one at a time, or both would measure each other."""


class Began(_Event, frozen=True):
    """A column is next: its process starts where it does not run, and its bundle is loaded."""

    column: str


class Ready(_Event, frozen=True):
    """A column's bundle is loaded, and reads the request."""

    column: str
    load_s: float | None  # None: it was loaded before (warm)


class Delta(_Event, frozen=True):
    """More of an answer: the texts of the tokens that came since the last time."""

    column: str
    texts: tuple[str, ...]


class Ended(_Event, frozen=True):
    """A column's answer is over; what it took."""

    column: str
    finish: str  # end, length, context, stop
    prompt_tokens: int
    tokens: int
    ttft_s: float
    tokens_per_s: float | None
    peak_rss_bytes: int  # of its own process
    bundle_bytes: int


class Refused(_Event, frozen=True):
    """A column cannot answer, or not to the end; the others go on."""

    column: str
    kind: str  # of error
    message: str


class Over(_Event, frozen=True):
    """Nothing more comes."""

    stopped: bool


Event = Waits | Began | Ready | Delta | Ended | Refused | Over


class _Run:
    """A request being answered: what is told of it, and the wish to stop."""

    def __init__(self, request: Request, tell: Callable[[Event], None]) -> None:
        self.request, self._tell = request, tell
        self.stopping = threading.Event()
        self._answering: tuple[Worker, WorkerSession] | None = None
        self._lock = threading.RLock()  # of what follows, so that events go out in order
        self._seq = 0
        self._column, self._texts = "", list[str]()

    def tell(self, kind: type[Event], /, **values: object) -> None:
        """Send an event, after the tokens that came before it."""
        with self._lock:
            self.flush()
            event = kind(run=self.request.run, seq=self._seq, **values)  # type: ignore[arg-type]
            self._seq += 1
            self._tell(event)

    def flush(self) -> None:
        """Send the tokens that wait."""
        with self._lock:
            if self._texts:
                texts, self._texts = tuple(self._texts), []
                self.tell(Delta, column=self._column, texts=texts)

    def add(self, column: str, token: Token) -> None:
        """Let a token wait for the next batch."""
        with self._lock:
            self._column = column
            self._texts.append(token.text)

    def stop(self) -> None:
        """End the answer that is being made, and begin no other; from any thread.

        Asked for again it ends the process, which may be deaf in a long call of its program.
        """
        again = self.stopping.is_set()
        self.stopping.set()
        answering = self._answering
        if answering is None:
            return
        worker, session = answering
        if again:
            threading.Thread(target=worker.close, daemon=True).start()
        else:
            session.stop()

    def answer(self, column: Column, worker: Worker) -> Stats:
        """Read an answer to its end, and return what it took."""
        request = self.request
        with contextlib.closing(worker.session(system=request.system)) as session:
            answer = session.stream(
                request.prompt, max_tokens=request.max_tokens, sampling=request.sampling)
            self._answering = worker, session
            try:
                if self.stopping.is_set():  # the wish came before there was what to stop
                    session.stop()
                for token in answer:
                    self.add(column.id, token)
            finally:
                self._answering = None
            return session.stats


class Runs:
    """Requests to some bundles, one at a time; see the module."""

    _turn = threading.Lock()  # two labs at once would slow each other, and spoil the figures

    def __init__(
        self, columns: Sequence[Column], tell: Callable[[Event], None], *,
        warm_s: float = _WARM_S,
    ) -> None:
        """Tell of every run to `tell`; end processes that were not asked for `warm_s`."""
        self.columns = {column.id: column for column in columns}
        self._tell, self._warm_s = tell, warm_s
        self._idle: threading.Timer | None = None
        self._workers = self._new_workers()
        self._lock = threading.RLock()  # of the run
        self._run: _Run | None = None
        self._thread: threading.Thread | None = None
        self.request: Request | None = None  # of the last run
        self.welcomes: dict[str, Welcome] = {}
        """How each process that was started guards itself, by column."""

    def __repr__(self) -> str:
        return f"Runs({', '.join(column.name for column in self.columns.values())})"

    @property
    def running(self) -> bool:
        """Whether a run is going on."""
        return self._run is not None

    def begin(self, request: Request) -> None:
        """Begin to answer, on a thread of its own.

        Raises:
            EngineBusy: a run is going on.
            SettingError: it asks a column that there is not.
        """
        if not set(request.columns) <= set(self.columns):
            raise SettingError("The request names a tier that this lab has not; choose another.")
        with self._lock:
            if self._run is not None:
                raise EngineBusy("A run is going on; stop it first.")
            run = self._run = _Run(request, self._tell)
            self.request = request
        self._thread = threading.Thread(target=self._serve, args=(run,), daemon=True)
        self._thread.start()

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
        if self._idle is not None:
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

    def _cool_later(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = threading.Timer(self._warm_s, self._cool)
        self._idle.daemon = True
        self._idle.start()

    def _serve(self, run: _Run) -> None:
        over = threading.Event()

        def send_batches() -> None:
            while not over.wait(_BATCH_S):
                run.flush()

        sender = threading.Thread(target=send_batches, daemon=True)
        sender.start()
        try:
            if self._take_turn(run):
                try:
                    for id_ in run.request.columns:
                        if not run.stopping.is_set():
                            self._ask(run, self.columns[id_])
                finally:
                    self._turn.release()
        finally:
            over.set()
            sender.join()
            with self._lock:  # whoever hears of the end may begin the next run at once
                self._run = None
                self._cool_later()
                run.tell(Over, stopped=run.stopping.is_set())

    def _take_turn(self, run: _Run) -> bool:
        """Wait until no other lab of this process runs; False where stopped before that."""
        if self._turn.acquire(blocking=False):
            return True
        run.tell(Waits)
        while not run.stopping.is_set():
            if self._turn.acquire(timeout=_LOOK_S):
                return True
        return False

    def _ask(self, run: _Run, column: Column) -> None:
        try:
            self._ask_or_raise(run, column)
        except CloisterError as error:
            run.tell(Refused, column=column.id, kind=type(error).__name__, message=str(error))
        except Exception as error:  # its words may quote what was asked
            run.tell(Refused, column=column.id, kind="WorkerError", message=(
                f"The lab failed unexpectedly ({place_of(error)}); report it."))

    def _ask_or_raise(self, run: _Run, column: Column) -> None:
        run.tell(Began, column=column.id)
        size = Bundle.open(column.path).manifest.size_bytes
        worker = self._workers[column.id]
        before = worker.loaded
        if not self._start(worker, run):
            return
        loaded, self.welcomes[column.id] = worker.loaded, worker.ready().welcome
        cold = loaded is not None and loaded is not before
        run.tell(Ready, column=column.id, load_s=loaded.load_s if cold and loaded else None)
        stats = run.answer(column, worker)
        run.tell(
            Ended, column=column.id, finish=stats.finish, prompt_tokens=stats.prompt_tokens,
            tokens=stats.tokens, ttft_s=stats.ttft_s, tokens_per_s=stats.decode_tokens_per_s,
            peak_rss_bytes=stats.peak_rss_bytes, bundle_bytes=size)

    def _start(self, worker: Worker, run: _Run) -> bool:
        """Start a worker, its bundle loaded; False where the run was stopped before that.

        A bundle that is being loaded cannot be interrupted: it goes on behind, and is warm for the
        next run. Where memory is short the other workers give theirs first.
        """
        failures: list[BaseException] = []

        def start() -> None:
            try:
                try:
                    worker.start()
                except NotEnoughMemory:
                    for other in self._workers.values():
                        if other is not worker:
                            other.close()
                    worker.start()
            except BaseException as error:
                failures.append(error)

        loading = threading.Thread(target=start, daemon=True)
        loading.start()
        while loading.is_alive():
            loading.join(_LOOK_S)
            if run.stopping.is_set():
                return False
        if failures:
            raise failures[0]
        return True
