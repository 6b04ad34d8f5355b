"""The worker: a process that holds a model and answers over a pipe.

One JSON object a line. Requests: `load`, `open`, `ask`, `stop`, `forget`; each is answered by
events that end with `done` or `error`. Requests are read on a thread of their own, so that `stop`
arrives while an answer is being made. Nothing that was said is logged, and the runtime's own
messages, which it writes to the standard error from C++, are kept away from people's terminals.

Run as `python -m cloister.runtime.worker`; `client.py` is the other end.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cloister.errors import CloisterError, SettingError, WorkerError
from cloister.vault.retention import Retention

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from cloister.runtime.engine import Engine
    from cloister.runtime.prefix import PrefixCache
    from cloister.runtime.session import Session
    from cloister.vault.namespace import Namespace
    from cloister.vault.store import Vault

__all__ = ["Service", "main"]


_MONTH = 30 * 24
PREFIXES = Retention(most_bytes=4 << 30, hours=_MONTH)
RESPONSES = Retention(most_bytes=64 << 20, hours=_MONTH)


@dataclass
class Service:
    """What the process holds: an engine, and the conversation with it."""

    send: Callable[[dict[str, Any]], None]
    engine: Engine | None = None
    session: Session | None = None
    system: str | None = None  # of the session
    vault: Vault | None = None
    space: Namespace | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def handle(self, request: dict[str, Any]) -> None:
        """Answer one request with events; the last is `done` or `error`."""
        try:
            handlers = {
                "load": self.load, "open": self.open, "ask": self.ask, "forget": self.forget}
            handler = handlers.get(str(request.get("do")))
            if handler is None:
                raise WorkerError("The worker does not know that request; update both ends.")
            self.send({"event": "done", **handler(request)})
        except CloisterError as error:
            self.send({"event": "error", "type": type(error).__name__, "message": str(error)})

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load `bundle`."""
        began = time.perf_counter()
        from cloister.runtime.engine import Engine

        self.engine = self.session = None  # their memory, before the new one takes its own
        self.engine = Engine(request["bundle"], threads=request.get("threads"))
        return {
            "model_id": self.engine.model_id, "backend": self.engine.backend,
            "context": self.engine.context, "load_s": time.perf_counter() - began, **_memory(),
        }

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open the vault at `namespace`, and where `session` is named, that conversation."""
        from cloister.runtime.session import Session
        from cloister.settings import Settings
        from cloister.vault import hygiene
        from cloister.vault.local import open_vault

        if self.engine is None:
            raise WorkerError("No bundle is loaded; load one first.")
        self.close()
        passphrase = request.get("passphrase")
        memory = hygiene.keep_out_of_dumps()
        self.vault = open_vault(
            Settings.from_environment(), None if passphrase is None else lambda: passphrase,
            create=True)
        memory |= self.vault.keys.locked()
        self.space = self.vault.namespace(request["namespace"])
        opened = {"provider": str(self.vault.header.provider), "memory": memory}
        name = request.get("session")
        if name is None:
            return opened
        self.session = Session(
            self.engine, system=request.get("system"), name=name,
            prefixes=self._prefixes(request.get("kv", "float32")))
        conversation = self.session.conversation
        assert conversation is not None
        self.system = conversation.system
        return {**opened, "messages": len(conversation.messages),
                "restored_tokens": conversation.restored}

    def close(self) -> None:
        """Let go of the vault."""
        if self.vault is not None:
            self.vault.close()
        self.vault = self.space = self.session = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer `prompt` in the current conversation, or in a new one.

        With `cached`, out of the vault where it was answered before.
        """
        from cloister.runtime.sampling import Sampling
        from cloister.runtime.session import Session

        if self.engine is None:
            raise WorkerError("No bundle is loaded; load one first.")
        try:
            sampling = Sampling(**request["sampling"])
        except TypeError:  # values are checked by Sampling itself
            raise SettingError(
                "The request names an unknown sampling setting; use the fields of Sampling."
            ) from None
        session, system = self.session, request.get("system")
        kept = session is not None and session.conversation is not None
        if session is None:
            session = Session(self.engine, system=system, **self._caches(request))
        elif system != self.system and not (kept and system is None):
            raise SettingError(
                "The conversation has another system prompt; begin a new one to change it."
            )
        tokens = session.stream(
            request["prompt"], max_tokens=request.get("max_tokens"), sampling=sampling,
            top=request.get("top", 0),
        )
        self.session = session  # only now: a refusal begins nothing
        if not kept:
            self.system = system
        if self.stopping.is_set():  # the wish came before the answer could begin
            session.stop()
        for token in tokens:
            self.send({
                "event": "token", "id": token.id, "text": token.text, "logprob": token.logprob,
                "top": token.top,
            })
        stats = session.stats
        return {
            "prompt_tokens": stats.prompt_tokens, "restored_tokens": stats.restored_tokens,
            "tokens": stats.tokens, "finish": stats.finish,
            "ttft_s": stats.ttft_s, "decode_tokens_per_s": stats.decode_tokens_per_s,
            "guard_tier": 0, **_memory(),
        }

    def _caches(self, request: dict[str, Any]) -> dict[str, Any]:
        if not request.get("cached"):
            return {}
        if self.engine is None or self.space is None:
            raise WorkerError("No vault is open; open it first.")
        from cloister.runtime.responses import ResponseCache

        return {
            "prefixes": self._prefixes(),
            "responses": ResponseCache(self.space, self.engine.model_id, RESPONSES),
        }

    def _prefixes(self, kv: str = "float32") -> PrefixCache:
        from cloister.runtime.prefix import Precision, PrefixCache

        assert self.engine is not None and self.space is not None
        return PrefixCache(
            self.engine, self.space, precision=Precision(kv), retention=PREFIXES)

    def forget(self, request: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """End the conversation; the next prompt begins a new one."""
        self.session = None
        return {}

    def stop(self) -> None:
        """End the running answer, or the one that was asked for, within one token."""
        self.stopping.set()
        session = self.session
        if session is not None:
            session.stop()


def _memory() -> dict[str, Any]:
    from cloister.runtime.memory import peak_bytes

    return {"peak_rss_bytes": peak_bytes()}


def main() -> None:
    """Serve until the other end closes the pipe."""
    # A terminal sends Ctrl-C to the client too, which says `stop` or closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only our own lines may reach the client: both descriptors are moved out of everybody's way.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    if "--debug" not in sys.argv:
        os.dup2(silent, 2)
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    service = Service(send=lambda event: _send(lines, event))
    threading.Thread(target=_read, args=(requests, service), daemon=True).start()
    while (request := requests.get()) is not None:
        service.handle(request)
    service.close()


def _read(requests: queue.SimpleQueue[dict[str, Any] | None], service: Service) -> None:
    try:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if request["do"] == "stop":
                service.stop()
            else:
                service.stopping.clear()  # in the order of the pipe: a stop is for what came before
                requests.put(request)
    except (ValueError, TypeError, KeyError):
        pass  # the other end died within a line, or is none of ours
    finally:
        service.stop()  # the other end is gone: so is the wish for an answer
        requests.put(None)


def _send(lines: TextIO, event: dict[str, Any]) -> None:
    lines.write(json.dumps(event) + "\n")
    lines.flush()


if __name__ == "__main__":
    main()
