"""The near end of a worker. Imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from cloister import errors
from cloister.errors import CloisterError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

__all__ = ["Piece", "Worker"]


@dataclass(frozen=True)
class Piece:
    """One generated token. Its repr does not show the text."""

    id: int
    text: str = field(repr=False)
    logprob: float
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)


class Worker:
    """A worker process, for the length of a `with` block. It ends when this process does.

    What was said travels through the pipe only: never in arguments, in the environment or in a
    file.

    Raises:
        WorkerError: the process ended without an answer.
        CloisterError: whatever the worker refused, by its own class.
    """

    def __init__(self, *, debug: bool = False) -> None:
        self._debug = debug

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            # -P: a module that lies in the current directory must not run beside private text.
            [sys.executable, "-P", "-m", "cloister.runtime.worker", *["--debug"] * self._debug],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.stats: dict[str, Any] = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:  # it is gone already
            self._process.kill()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def load(self, bundle: str | Path, *, threads: int | None = None) -> dict[str, Any]:
        """Load a bundle: its `model_id`, `backend`, `context`, `load_s`, `peak_rss_bytes`."""
        self._send({"do": "load", "bundle": str(bundle), "threads": threads})
        return self._last()

    def open(
        self, *, namespace: str = "default", session: str | None = None,
        system: str | None = None, passphrase: str | None = None, kv: str = "float32",
    ) -> dict[str, Any]:
        """Open the vault, which is made where there is none; with `session`, go on with it.

        `kv` is how its keys and values are kept: `float32`, or `int8`, which is not exact.

        Its `provider`, and what was done for `memory`; of a session, how many `messages` it has
        and how many `restored_tokens` need not be read again.
        """
        self._send({
            "do": "open", "namespace": namespace, "session": session, "system": system,
            "passphrase": passphrase, "kv": kv,
        })
        return self._last()

    def stream(
        self,
        prompt: str,
        *,
        system: str | None = None,
        cached: bool = False,
        max_tokens: int | None = None,
        sampling: dict[str, Any] | None = None,
        top: int = 0,
    ) -> Iterator[Piece]:
        """Answer `prompt` in the running conversation; `stats` holds what it took, afterwards.

        A conversation keeps the system prompt it began with. `sampling` has the fields of
        `cloister.runtime.sampling.Sampling`. With `cached`, in a conversation that is not kept,
        what was read or answered before comes out of the vault.
        """
        self._send({
            "do": "ask", "prompt": prompt, "system": system, "max_tokens": max_tokens,
            "sampling": sampling or {}, "top": top, "cached": cached,
        })
        try:
            for event in self._events():
                if event["event"] == "token":
                    yield Piece(
                        event["id"], event["text"], event["logprob"],
                        tuple((id_, logprob) for id_, logprob in event["top"]),
                    )
                else:
                    self.stats = event
        except CloisterError:
            raise
        except BaseException:  # closed or interrupted: the rest must not become the next answer
            self.stop()
            self.stats = self._last()
            raise

    def stop(self) -> None:
        """End the running answer within one token; from any thread."""
        self._send({"do": "stop"})

    def forget(self) -> None:
        """End the conversation."""
        self._send({"do": "forget"})
        self._last()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise self._gone() from None

    def _last(self) -> dict[str, Any]:
        *_, last = self._events()
        return last

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "error":
                raise _error(event)
            yield event
            if event["event"] == "done":
                return
        raise self._gone()

    def _gone(self) -> WorkerError:
        code = self._process.poll()
        return WorkerError(
            "The worker process ended without an answer"
            + (f" (exit status {code})" if code is not None else "")
            + "; run the command again, with --debug to see why."
        )


def _error(event: dict[str, Any]) -> CloisterError:
    kind = getattr(errors, str(event["type"]), WorkerError)
    error: CloisterError = kind(event["message"])
    return error
