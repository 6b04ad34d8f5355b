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

__all__ = ["decode"]

# -I: neither variables of the environment nor the current directory say what is imported. The
# places come last, so that no file beside a package stands in for one of the standard library.
_BEGIN = ("import sys; sys.path += sys.argv[1:]\n"
          "from cloister.media.child import main; main()")
_PACKAGES = {"picture": ("PIL",), "recording": ("numpy", "soundfile", "soxr")}
_HEAD_BYTES = 64  # more than the numbers of an answer


def decode(request: Request, data: bytes) -> Answer:
    """Decode `data` in a process of its own; an answer of a known code, of whatever content.

    Raises:
        WorkerError: the process could not start, or the packages that it needs are not installed.
        MediaTooLarge: it took more time than it may.
        MediaUnreadable: it ended without an answer.
    """
    expired = threading.Event()
    with contextlib.ExitStack() as stack:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _BEGIN, *_places(request)], env={}, cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C is for this process, which ends the other
        )
        stack.callback(_end, child)

        def expire() -> None:
            expired.set()
            child.kill()

        timer = threading.Timer(request.limits.seconds, expire)
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        begun, raw = _exchange(child, request, data)
    if expired.is_set() or child.returncode == -signal.SIGXCPU:
        raise MediaTooLarge(
            f"Decoding took over {request.limits.seconds} s; give a smaller or simpler file.")
    if not begun:
        raise WorkerError(
            f"The process that decodes media could not start (exit status {child.returncode}); "
            "install \"cloister[media]\" anew.")
    try:
        return Answer.unpack(raw)
    except ValueError:
        raise MediaUnreadable("A file made its decoder fail; do not trust it.") from None


def _exchange(
    child: subprocess.Popen[bytes], request: Request, data: bytes
) -> tuple[bool, bytes]:
    """Return whether the process began, and its answer, whole or as far as it came."""
    assert child.stdin is not None
    assert child.stdout is not None
    begun = False
    try:
        child.stdin.write(msgspec.json.encode(request) + b"\n")
        child.stdin.flush()
        begun = child.stdout.read(1) == READY
        if begun:
            child.stdin.write(data)
        child.stdin.close()
    except BrokenPipeError:  # it ended: what it said, and how it ended, tell why
        pass
    raw = child.stdout.read(request.limits.result_bytes + _HEAD_BYTES)
    if len(raw) < request.limits.result_bytes + _HEAD_BYTES:
        child.wait()  # it has closed its end; the timer runs on
    return begun, raw


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):  # of bytes that it did not read
            if pipe is not None:
                pipe.close()
    child.wait()


def _places(request: Request) -> list[str]:
    """Return the directories that have this package and those that decoding needs."""
    kind = "picture" if request.picture is not None else "recording"
    found = [importlib.util.find_spec(name) for name in ("cloister", "msgspec", *_PACKAGES[kind])]
    places = []
    for spec in found:
        if spec is None or spec.origin is None:
            raise WorkerError(
                f"The packages that decode a {kind} are not installed; "
                "pip install \"cloister[media]\".")
        path = Path(spec.origin)
        places.append(str(path.parents[1 if path.name == "__init__.py" else 0]))
    return list(dict.fromkeys(places))
