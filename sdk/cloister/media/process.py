"""Start the process that decodes one file, hand it the file, and take its answer."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import MediaTooLarge, MediaUnreadable, WorkerError
from cloister.media.exchange import READY, Answer

if TYPE_CHECKING:
    from cloister.media.exchange import Request

__all__ = ["decode", "not_installed"]

# -I: neither variables of the environment nor the current directory say what is imported. The
# places come last, so that no file beside a package stands in for one of the standard library.
_BEGIN = ("import sys; sys.path += sys.argv[1:]\n"
          "from cloister.media.child import main; main()")
_PACKAGES = {"picture": ("PIL", "numpy"), "recording": ("numpy", "soundfile", "soxr")}
_HEAD_BYTES = 64  # more than the numbers of an answer


def decode(request: Request, data: bytes) -> Answer:
    """Decode `data` in a process of its own; an answer of a known code, of whatever content.

    The process has ended when this returns or raises, and also when it is interrupted.

    Raises:
        WorkerError: the process could not start, or the packages that it needs are not installed.
        MediaTooLarge: it took more time than it may.
        MediaUnreadable: it ended without an answer.
    """
    run = _Run(request, data, _places(request))
    try:
        run.start()
        run.join(request.limits.seconds)
        expired = run.is_alive()
    finally:
        run.stop()
        with contextlib.suppress(RuntimeError):  # interrupted as it began: it starts nothing then
            run.join()
    if expired or run.status == -signal.SIGXCPU:
        raise MediaTooLarge(
            f"Decoding took over {request.limits.seconds} s; give a smaller or simpler file.")
    if not run.begun:
        raise WorkerError(
            f"The process that decodes media could not start ({run.why}); install "
            "\"cloister[media]\" anew.")
    try:
        return Answer.unpack(run.raw)
    except ValueError:
        raise MediaUnreadable("A file made its decoder fail; do not trust it.") from None


def not_installed(kind: str) -> WorkerError:
    """Return the error for a `kind` of media whose packages are missing."""
    return WorkerError(
        f"The packages that decode a {kind} are not installed; pip install \"cloister[media]\".")


class _Run(threading.Thread):
    """A process from its start to its end.

    On a thread, since an interrupt reaches only the main one: there, between the start of a process
    and the moment that its number is known, it would leave a process that nobody waits for.
    """

    def __init__(self, request: Request, data: bytes, places: list[str]) -> None:
        super().__init__(daemon=True)
        self._request, self._data, self._places = request, data, places
        self._lock = threading.Lock()  # of the two below
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self.begun = False  # it was given the file
        self.raw = b""  # its answer, whole or as far as it came
        self.status: int | None = None
        self.why = "it was stopped"  # it has not begun

    def run(self) -> None:
        """Start the process, hand it the file, take its answer, and end it."""
        try:
            with self._lock:
                if self._stopped:
                    return
                self._child = child = subprocess.Popen(
                    [sys.executable, "-I", "-c", _BEGIN, *self._places], env={}, cwd="/",
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    process_group=0,  # a terminal's Ctrl-C is for this process only
                )
        except OSError as error:
            self.why = error.strerror or type(error).__name__
            return
        try:
            self._exchange(child)
        finally:
            self.stop()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(BrokenPipeError):  # of bytes that it did not read
                    if pipe is not None:
                        pipe.close()
            self.status = child.wait()
            self.why = f"exit status {self.status}"

    def stop(self) -> None:
        """End the process, from any thread; not after its end has been seen."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()

    def _exchange(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(msgspec.json.encode(self._request) + b"\n")
            child.stdin.flush()
            self.begun = child.stdout.read(1) == READY
            if self.begun:
                child.stdin.write(self._data)
            child.stdin.close()
        except BrokenPipeError:  # it ended: what it said, and how it ended, tell why
            pass
        most = self._request.limits.result_bytes + _HEAD_BYTES
        self.raw = child.stdout.read(most)
        if len(self.raw) < most:
            child.wait()  # it has closed its end


def _places(request: Request) -> list[str]:
    """Return the directories that have this package and those that decoding needs."""
    kind = "picture" if request.picture is not None else "recording"
    found = [importlib.util.find_spec(name) for name in ("cloister", "msgspec", *_PACKAGES[kind])]
    places = []
    for spec in found:
        if spec is None or spec.origin is None:
            raise not_installed(kind)
        path = Path(spec.origin)
        places.append(str(path.parents[1 if path.name == "__init__.py" else 0]))
    return list(dict.fromkeys(places))
