"""The near end of a worker. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import queue
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Self, TypeVar

from cloister import errors
from cloister.errors import CloisterError, ProtocolError, SettingError, WorkerError
from cloister.message import Message
from cloister.runtime import protocol
from cloister.runtime.chat import Ask, Chat, Stats, Token
from cloister.runtime.draft import AUTO
from cloister.runtime.prompt import decoded, messages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from cloister.guard import Attempt
    from cloister.pieces import MediaFormats
    from cloister.runtime.chat import Begin
    from cloister.runtime.prompt import Count, Prompt
    from cloister.runtime.protocol import Event, Request

__all__ = ["Worker", "WorkerSession"]

_E = TypeVar("_E", bound="Event")
_Call = (protocol.Load | protocol.Unlock | protocol.Begin | protocol.Count | protocol.Forget
         | protocol.Record | protocol.Probe)
_GRACE_S = 30  # for a cancelled request, which a long call of the program may hold up


class Worker:
    """A model in a process of its own, which has no network and ends when this one does.

    What was said travels through the pipe only: never in arguments, in the environment or in a
    file. Conversations take turns: a question waits for those before it. Where the process dies,
    the answer at hand fails by name and the next question begins a new process, which goes on with
    every conversation where it was.

    Raises (from its methods):
        WorkerError: the process ended without an answer.
        CloisterError: whatever the worker refused, by its own class.
    """

    def __init__(
        self, bundle: str | Path | None = None, *, threads: int | None = None,
        draft: str | Path = AUTO, passphrase: Callable[[], str] | None = None,
        vault: bool = True, debug: bool = False,
    ) -> None:
        """Say what `start` loads; `passphrase` is asked for that of a vault that has one.

        `draft` is what guesses tokens, see `Engine`. Without `vault` nothing can be kept, and the
        process is refused local services, too.
        """
        self._bundle = None if bundle is None else str(bundle)
        self._draft = str(draft)
        self._threads, self._passphrase, self._debug = threads, passphrase, debug
        self._vault = vault
        self._process: _Process | None = None
        self._lock = threading.RLock()  # of the process
        self.loaded: protocol.Loaded | None = None
        self.unlocked: protocol.Unlocked | None = None

    def __repr__(self) -> str:
        return f"Worker({'running' if self._process else 'not running'})"

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:  # a notebook's cell that ran again: no model stays behind
            process.abandon()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> Self:
        """Start the process now, and load the bundle; the first use does it otherwise."""
        self.ready()
        return self

    def close(self) -> None:
        """End the process; what is unfinished is kept first. More than once does no harm."""
        with self._lock:
            process, self._process, self.unlocked = self._process, None, None
        if process is not None:
            process.close()

    def load(
        self, bundle: str | Path, *, threads: int | None = None, draft: str | Path = AUTO
    ) -> protocol.Loaded:
        """Load a bundle in place of the one that is loaded, whose conversations end."""
        with self._lock:
            self._bundle, self._threads, self.loaded = str(bundle), threads, None
            self._draft = str(draft)
            self.ready()
        assert self.loaded is not None
        return self.loaded

    def session(
        self, *, system: str | None = None, namespace: str = "default", name: str | None = None,
        cached: bool = False, kv: str = "float32",
    ) -> WorkerSession:
        """Begin a conversation, or go on with the one kept under `name`; see `Session`."""
        return WorkerSession(self, protocol.Begin(
            id=0, chat=0, system=system, namespace=namespace, name=name, cached=cached, kv=kv))

    def record(self, texts: Iterable[str], *, namespace: str = "default") -> None:
        """Keep fingerprints of texts in the vault, so that `cloister lab check` finds them."""
        process = self.ready(vault=True)
        process.call(protocol.Record(
            id=process.next_id(), texts=tuple(texts), namespace=namespace), protocol.Recorded)

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        process = self._process
        return process is not None and not process.ended

    @property
    def welcome(self) -> protocol.Welcome:
        """How the process guards itself, by its own word; it is started where it does not run."""
        return self.ready().welcome

    @property
    def guard_tier(self) -> int:
        """What refuses the network to the process (see `cloister.guard`)."""
        return self.welcome.guard_tier

    def probe(self) -> tuple[Attempt, ...]:
        """Let the process try to reach out, after what it is answering, and tell how that went."""
        process = self.ready()
        return process.call(
            protocol.Probe(id=process.next_id()), protocol.Probed).attempts

    def ready(self, *, vault: bool = False) -> _Process:
        """Return the running process, its bundle loaded and, where asked for, its vault open."""
        with self._lock:
            if self._process is not None and self._process.ended:
                self.close()
            if self._process is None:
                self._process = _Process(debug=self._debug, vault=self._vault)
                self.loaded = None
            process = self._process
            if self._bundle is not None and self.loaded is None:
                self.loaded = process.call(protocol.Load(
                    id=process.next_id(), bundle=self._bundle, threads=self._threads,
                    draft=self._draft), protocol.Loaded)
            if vault and not self._vault:
                raise SettingError("This worker was made without a vault; make one with it.")
            if vault and self.unlocked is None:
                self.unlocked = process.call(protocol.Unlock(
                    id=process.next_id(), passphrase=self._secret()), protocol.Unlocked)
            return process

    def _secret(self) -> str | None:
        """The passphrase, where the vault has one that the environment does not tell."""
        from cloister.settings import Settings
        from cloister.vault.keys import Provider
        from cloister.vault.local import header

        settings = Settings.from_environment()
        known = header(settings)
        if self._passphrase is None or settings.passphrase is not None or known is None:
            return None
        return self._passphrase() if known.provider is Provider.PASSPHRASE else None


class WorkerSession(Chat):
    """A conversation whose model runs in a worker; see `Chat`."""

    def __init__(self, worker: Worker, begin: protocol.Begin) -> None:
        """Begin as `begin` says; made by `Worker.session`."""
        super().__init__()
        if begin.system is not None and not isinstance(begin.system, str):
            raise SettingError("A system prompt is a text; give one, or None.")
        self._worker, self._plan = worker, begin
        self._messages: list[Message] = []
        self._process: _Process | None = None  # where it was begun
        self._chat = self._request = 0
        self._prompted = False  # the first message is the system prompt
        self.restored_tokens = 0
        self._begun()

    @property
    def messages(self) -> list[Message]:
        """What was said and kept, the system prompt first."""
        return list(self._messages)

    def stop(self) -> None:
        """End the running answer within one token; what was generated stays."""
        process = self._process
        if process is not None:
            with contextlib.suppress(WorkerError):
                process.send(protocol.Cancel(id=self._request))

    def forget(self) -> None:
        """Delete what was said, and what is kept of it; see `Chat.forget`."""
        super().close()
        process = self._begun()
        begun = process.call(
            protocol.Forget(id=process.next_id(), chat=self._chat), protocol.Begun)
        self._messages, self.restored_tokens = list(begun.messages), begun.restored_tokens

    def count(
        self, prompt: Prompt, *, tools: Sequence[Mapping[str, object]] | None = None
    ) -> Count:
        """Count the tokens of a prompt; see `Chat.count`."""
        ask = Ask(messages=decoded(messages_of(prompt), self._formats()), tools=tools)
        process = self._begun()
        return process.call(protocol.Count(
            id=process.next_id(), chat=self._chat, ask=ask), protocol.Counted).count

    def close(self) -> None:
        """Keep what is unfinished, and let go of the conversation."""
        super().close()
        process, self._process = self._process, None
        if process is not None and not process.ended:
            with contextlib.suppress(WorkerError):  # it waits for no other conversation's answer
                process.send(protocol.End(id=process.next_id(), chat=self._chat))

    def _formats(self) -> MediaFormats | None:
        self._begun()
        loaded = self._worker.loaded
        return None if loaded is None else loaded.media

    def _begun(self) -> _Process:
        """Return the process where this conversation is begun; begin it anew after a death."""
        plan = self._plan
        process = self._worker.ready(vault=plan.cached or plan.name is not None)
        if process is self._process:
            return process
        said = self._messages[self._prompted:]
        self._chat = process.next_id()
        begun = process.call(protocol.Begin(
            id=self._chat, chat=self._chat, system=plan.system, messages=tuple(said),
            namespace=plan.namespace, name=plan.name, cached=plan.cached, kv=plan.kv,
        ), protocol.Begun)
        if not said:  # of a new conversation, or of one that is kept and gone on with
            self._prompted = begun.messages[:1] != () and begun.messages[0].role == "system"
        self._messages, self.restored_tokens = list(begun.messages), begun.restored_tokens
        self._process = process
        return process

    def _answer(self, ask: Ask) -> Begin:
        process = self._begun()
        id_ = process.next_id()
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        count = len(self._messages)
        ends: list[Event | None] = []  # how the request ended; None where the process did

        def tokens() -> Generator[Token]:
            while True:
                event = events.get()
                if isinstance(event, protocol.Produced):
                    yield event.token
                    continue
                ends.append(event)
                if event is None:
                    raise process.gone()
                if isinstance(event, protocol.Failed):
                    raise _error(event)
                return

        def settle(said: list[Token]) -> None:
            if not ends:
                ends.append(process.cancel(id_, events))
            process.forget(id_)
            (end,) = ends
            if isinstance(end, protocol.Answered | protocol.Failed) and end.stats is not None:
                self.stats = end.stats
            if isinstance(end, protocol.Answered | protocol.Failed):
                if end.kept:
                    self._messages[ask.after if ask.after is not None else count:] = end.kept
            elif ask.after in (None, count) and (text := "".join(token.text for token in said)):
                # The next process is told. Of one that went back only the vault knows how far.
                self._messages += [*ask.messages, Message(role="assistant", content=text)]

        def begin() -> tuple[Generator[Token], Callable[[list[Token]], None]]:
            self._request, self.stats = id_, Stats()
            process.ask(protocol.Question(id=id_, chat=self._chat, ask=ask), events)
            return tokens(), settle

        return begin


class _Process:
    """A running worker process, and the thread that reads what it says."""

    def __init__(self, *, debug: bool, vault: bool) -> None:
        self._child = subprocess.Popen(
            # -P: a module that lies in the current directory must not run beside private text.
            [sys.executable, "-P", "-m", "cloister.runtime.worker", *["--debug"] * debug],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C is for the client, from the first moment on
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._to, self._from = self._child.stdin, self._child.stdout
        self.dead = threading.Event()
        self._ids = itertools.count(1)
        self._lock = threading.RLock()  # of the pipe to the worker, and of what waits
        self._waiting: dict[int, queue.SimpleQueue[Event | None]] = {}
        self._reader: threading.Thread | None = None
        try:
            self.send(protocol.Hello(vault=vault))
            line = protocol.read_line(self._from)
            event = None if line is None else protocol.decode_event(line)
            if isinstance(event, protocol.Failed):
                raise _error(event)
            if not isinstance(event, protocol.Welcome):
                raise self.gone()
            if event.version != protocol.VERSION:
                raise ProtocolError("The worker is of another version; install one of them anew.")
        except BaseException:
            self.close()
            raise
        self.welcome = event
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def ended(self) -> bool:
        """Whether the process is gone, or can no longer be understood."""
        return self.dead.is_set() or self._child.poll() is not None

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._child.pid

    def next_id(self) -> int:
        """Return an id that no other request has."""
        return next(self._ids)

    def send(self, request: Request) -> None:
        """Send a request.

        Raises:
            ProtocolError: it is too large, or holds what JSON has not.
            WorkerError: the process is gone.
        """
        line = protocol.check(request)
        try:
            with self._lock:
                self._to.write(line)
                self._to.flush()
        except (OSError, ValueError):
            raise self.gone() from None

    def ask(
        self, request: _Call | protocol.Question, events: queue.SimpleQueue[Event | None],
    ) -> None:
        """Send a request, whose events go to `events`, and None where the process ends."""
        with self._lock:
            self._waiting[request.id] = events
        try:
            self.send(request)
        except BaseException:
            self.forget(request.id)
            raise
        if self.dead.is_set():
            events.put(None)

    def call(self, request: _Call, kind: type[_E]) -> _E:
        """Send a request, and return the one event that answers it."""
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.ask(request, events)
        try:
            event = events.get()
        finally:
            self.forget(request.id)
        if isinstance(event, protocol.Failed):
            raise _error(event)
        if event is None:
            raise self.gone()
        if not isinstance(event, kind):
            raise ProtocolError("The worker answered something else; update both ends.")
        return event

    def cancel(self, id_: int, events: queue.SimpleQueue[Event | None]) -> Event | None:
        """End a request, and return how it ended; a process that does not end it is killed."""
        try:
            self.send(protocol.Cancel(id=id_))
            while isinstance(event := events.get(timeout=_GRACE_S), protocol.Produced):
                pass
        except (WorkerError, queue.Empty):
            self._child.kill()
            return None
        return event

    def abandon(self) -> None:
        """Let the process end, without waiting for it: it keeps what is unfinished first."""
        with contextlib.suppress(OSError):
            self._to.close()

    def forget(self, id_: int) -> None:
        """Pass over what may still come for a request."""
        with self._lock:
            self._waiting.pop(id_, None)

    def gone(self) -> WorkerError:
        """Return the error that says how the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=1)
        code = self._child.poll()
        return WorkerError(
            "The worker process ended without an answer"
            + (f" (exit status {code})" if code is not None else "")
            + "; ask again. To see why, run the command with --debug, or make the Worker with "
            "debug=True."
        )

    def close(self) -> None:
        """End the process, which keeps what is unfinished; a second wait kills it."""
        try:
            self._to.close()
        except OSError:  # it is gone already
            self._child.kill()
        try:
            self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._reader is not None:
            self._reader.join(timeout=5)
        if self._reader is None or not self._reader.is_alive():
            self._from.close()
        self.dead.set()

    def _read(self) -> None:
        """Give each event to who waits for it."""
        understood = False
        try:
            while (line := protocol.read_line(self._from)) is not None:
                event = protocol.decode_event(line)
                with self._lock:
                    waiting = self._waiting.get(getattr(event, "id", None) or 0)
                if waiting is not None:
                    waiting.put(event)
            understood = True
        except (ProtocolError, OSError, ValueError):
            pass
        finally:  # nobody waits for what cannot come
            self.dead.set()
            with self._lock:
                for waiting in self._waiting.values():
                    waiting.put(None)
        if not understood:  # otherwise it is ending by itself, and may be keeping something
            self._child.kill()


def _error(event: protocol.Failed) -> CloisterError:
    kind = getattr(errors, event.kind, WorkerError)
    if not (isinstance(kind, type) and issubclass(kind, CloisterError)):
        kind = WorkerError
    return kind(event.message)
