"""The worker: a process that holds a model and a vault, and answers over a pipe (`protocol`).

Requests are read on a thread of their own, so that a cancellation arrives while an answer is being
made; they are served one after the other. Before anything is read the process closes what it
inherited, refuses itself the network, and keeps its memory out of dumps. Nothing that was said is
logged, and the runtime's own messages, which it writes to the standard error from C++, are kept
away from people's terminals.

Run as `python -m cloister.runtime.worker`; `client.py` is the other end.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from cloister import guard
from cloister.audit.notebook import Trail
from cloister.errors import CloisterError, ProtocolError, WorkerError, named
from cloister.runtime import protocol
from cloister.runtime.chat import Stats
from cloister.runtime.memory import peak_bytes
from cloister.runtime.prompt import refuse_undecoded
from cloister.settings import share_processor
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

    from cloister.guard import Guard
    from cloister.message import Message
    from cloister.runtime.engine import Engine
    from cloister.runtime.protocol import Event, Request
    from cloister.runtime.session import Session
    from cloister.vault.store import Vault

__all__ = ["Service", "main"]


class Service:
    """What the process holds: an engine, a vault, and conversations by their numbers."""

    def __init__(self, send: Callable[[Event], None], guard: Guard | None = None) -> None:
        """Send every event by `send`; `guard` is what refuses the network to the process."""
        self._send, self._guard = send, guard
        self._engine: Engine | None = None
        self._vault: Vault | None = None
        self._sessions: dict[int, Session] = {}
        self._trails: dict[str, Trail] = {}  # by namespace
        self._lock = threading.Lock()  # of the two below
        self._running: tuple[int, Session] | None = None
        self._stopping = False  # the running question, or all once the other end is gone
        self._over = False
        self._queued: set[int] = set()  # questions that were read and not begun
        self._withdrawn: set[int] = set()  # of those, cancelled ones, which are answered already

    def handle(self, request: Request) -> None:
        """Answer one request with events; the last says how it ended."""
        try:
            event = self._serve(request)
        except Exception as error:
            event = failed(getattr(request, "id", None), error)
        if event is not None:
            self._send(event)

    def enqueue(self, request: Request) -> None:
        """Note that `request` will be handled, so that it can be cancelled before."""
        if isinstance(request, protocol.Question):
            with self._lock:
                self._queued.add(request.id)

    def cancel(self, id_: int) -> None:
        """End the request `id_` as soon as possible, begun or not; from any thread."""
        with self._lock:
            withdrawn = id_ in self._queued
            if withdrawn:
                self._queued.discard(id_)
                self._withdrawn.add(id_)
            elif self._running is not None and self._running[0] == id_:
                self._stopping = True
                self._running[1].stop()
        if withdrawn:
            self._send(protocol.Answered(id=id_, stats=Stats(finish="stop"), kept=()))

    def stop(self) -> None:
        """End the running answer and those that wait: nobody is there to read them."""
        with self._lock:
            self._over = self._stopping = True
            if self._running is not None:
                self._running[1].stop()

    def close(self) -> None:
        """Keep what is unfinished, and let go of the vault."""
        for session in self._sessions.values():
            with contextlib.suppress(CloisterError):  # a full disk, perhaps not for the others
                session.close()
        self._sessions.clear()
        if self._vault is not None:
            self._vault.close()
        self._vault = None

    def _serve(self, request: Request) -> Event | None:
        match request:
            case protocol.Load():
                return self._load(request)
            case protocol.Unlock():
                return self._unlock(request)
            case protocol.Begin():
                return self._begin(request)
            case protocol.Question():
                return self._ask(request)
            case protocol.Count():
                refuse_undecoded(request.ask.messages)
                session = self._session(request.chat)
                return protocol.Counted(id=request.id, count=session.count(
                    request.ask.messages, tools=request.ask.tools))
            case protocol.End():
                if request.chat in self._sessions:
                    self._sessions[request.chat].close()
                    del self._sessions[request.chat]
                return protocol.Ended(id=request.id)
            case protocol.Forget():
                session = self._session(request.chat)
                session.forget()
                return _begun(request.id, session)
            case protocol.Record():
                return self._record(request)
            case protocol.Probe():
                return protocol.Probed(id=request.id, attempts=guard.probe())
            case _:
                raise ProtocolError("The worker was greeted twice; update both ends.")

    def _load(self, request: protocol.Load) -> Event:
        began = time.perf_counter()
        from cloister.runtime.engine import Engine

        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._engine = None  # its memory, before the new one takes its own
        engine = self._engine = Engine(
            request.bundle, threads=request.threads, draft=request.draft)
        return protocol.Loaded(
            id=request.id, model_id=engine.model_id, backend=engine.backend,
            context=engine.context, media=engine.bundle.manifest.media,
            load_s=time.perf_counter() - began, peak_rss_bytes=peak_bytes())

    def _unlock(self, request: protocol.Unlock) -> Event:
        from cloister.vault.keys import Provider
        from cloister.vault.local import open_vault

        secret = request.passphrase
        if self._vault is None:
            self._vault = open_vault(  # its notice goes to the client
                None if secret is None else lambda: secret, create=True,
                notify=lambda notice: None)
            # A key store is asked once more at the end, over a socket of this machine.
            if self._guard is not None and self._vault.header.provider is not Provider.KEYRING:
                self._guard = self._guard.narrow()
        return protocol.Unlocked(
            id=request.id, provider=str(self._vault.header.provider),
            notice=self._vault.notice or None, memory=self._vault.keys.locked())

    def _begin(self, request: protocol.Begin) -> Event:
        from cloister.runtime.session import Session

        if self._engine is None:
            raise WorkerError("No bundle is loaded; load one first.")
        if (request.cached or request.name is not None) and self._vault is None:
            raise WorkerError("No vault is open; open it first.")
        refuse_undecoded(request.messages)
        session = self._sessions[request.chat] = Session(
            self._engine, system=request.system, messages=request.messages, vault=self._vault,
            namespace=request.namespace, name=request.name, cached=request.cached, kv=request.kv)
        return _begun(request.id, session)

    def _record(self, request: protocol.Record) -> Event:
        if self._vault is None:
            raise WorkerError("No vault is open; open it first.")
        if request.namespace not in self._trails:
            space = self._vault.namespace(request.namespace)
            self._trails[request.namespace] = Trail(space, Kind.HISTORY)
        self._trails[request.namespace].record(request.texts)
        return protocol.Recorded(id=request.id)

    def _session(self, chat: int) -> Session:
        if chat not in self._sessions:
            raise ProtocolError("The worker does not know that conversation; begin it first.")
        return self._sessions[chat]

    def _ask(self, request: protocol.Question) -> Event | None:
        session = self._sessions.get(request.chat)
        with self._lock:
            self._queued.discard(request.id)
            if request.id in self._withdrawn:
                self._withdrawn.discard(request.id)
                return None
            self._stopping = self._over
            if session is not None:
                self._running = request.id, session
        session = self._session(request.chat)
        before, after = session.messages, request.ask.after

        def kept() -> tuple[Message, ...]:
            said = session.messages
            return () if said == before else tuple(said[len(before[:after]):])

        try:
            refuse_undecoded(request.ask.messages)
            tokens = session.answer(request.ask)
            with self._lock:
                if self._stopping:  # the wish came before the answer could begin
                    session.stop()
            for token in tokens:
                self._send(protocol.Produced(id=request.id, token=token))
        except Exception as error:
            return failed(
                request.id, error, kept=kept(), stats=session.stats)
        finally:
            with self._lock:
                self._running = None
        return protocol.Answered(
            id=request.id, stats=session.stats, kept=kept())


def _begun(id_: int, session: Session) -> protocol.Begun:
    return protocol.Begun(
        id=id_, messages=tuple(session.messages), restored_tokens=session.restored_tokens)


def failed(
    id_: int | None, error: Exception, kept: Sequence[Message] = (), stats: Stats | None = None,
) -> protocol.Failed:
    """Tell of an error; one that is none of ours by type and place, as its words may quote."""
    ours = named(error, "The worker")
    return protocol.Failed(
        id=id_, kind=type(ours).__name__, message=str(ours), kept=tuple(kept), stats=stats)


def main() -> None:
    """Serve until the other end closes the pipe."""
    # A terminal sends Ctrl-C to the client too, which cancels its request or closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory = guard.keep_out_of_dumps()
    share_processor()
    # Only our own lines may reach the client: both descriptors are moved out of everybody's way.
    lines = os.fdopen(os.dup(1), "wb")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    if "--debug" not in sys.argv:
        os.dup2(silent, 2)

    writing = threading.Lock()

    def send(event: Event) -> None:
        try:
            line = protocol.encode(event)
        except CloisterError as error:
            line = protocol.encode(failed(getattr(event, "id", None), error))
        with writing:  # both threads tell of errors
            lines.write(line)
            lines.flush()

    try:
        guarded = guard.enforce(keep=(lines.fileno(),))
    except CloisterError as error:  # its own pipes are network connections
        send(protocol.Failed(id=None, kind=type(error).__name__, message=str(error)))
        return
    service = None
    try:
        greeted = _greeted(sys.stdin.buffer, send, guarded, memory)
        if greeted is not None:
            service = Service(send, greeted)
            _serve(service, sys.stdin.buffer, send)
    except BrokenPipeError:  # the other end is gone
        pass
    finally:
        if service is not None:
            service.close()


def _greeted(
    stream: IO[bytes], send: Callable[[Event], None], guarded: Guard, memory: dict[str, str]
) -> Guard | None:
    """Exchange first words; None where the other end speaks another version.

    Where no vault will be opened no key store is asked, and local services are refused too.
    """
    try:
        line = protocol.read_line(stream)
        hello = None if line is None else protocol.decode_request(line)
    except ProtocolError:
        hello = None
    if not isinstance(hello, protocol.Hello) or hello.version != protocol.VERSION:
        send(protocol.Failed(id=None, kind="ProtocolError", message=(
            f"The worker speaks version {protocol.VERSION} of its protocol; update both ends.")))
        return None
    guarded = guarded if hello.vault else guarded.narrow()
    send(protocol.Welcome(
        version=protocol.VERSION, guard_tier=guarded.tier, guard=guarded.reason,
        evidence=guarded.evidence, memory=memory))
    return guarded


def _serve(service: Service, stream: IO[bytes], send: Callable[[Event], None]) -> None:
    requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def read() -> None:
        line: bytes | None = b""
        try:
            while line is not None:
                line = b""
                try:
                    line = protocol.read_line(stream)
                    request = None if line is None else protocol.decode_request(line)
                except ProtocolError as error:
                    send(failed(protocol.id_of(line or b""), error))
                    continue
                if isinstance(request, protocol.Cancel):
                    service.cancel(request.id)
                elif request is not None:
                    service.enqueue(request)
                    requests.put(request)
        except OSError:  # of either pipe
            pass
        finally:
            service.stop()  # the other end is gone: so is the wish for an answer
            requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (request := requests.get()) is not None:
        service.handle(request)


if __name__ == "__main__":
    main()
