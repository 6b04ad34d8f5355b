"""What can be done, best effort, so that memory does not reach a disk; each item says how it went.

Python cannot promise to wipe memory, and nothing here claims it: strings are copied and freed at
the interpreter's will.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["keep_out_of_dumps", "lock_in_memory"]

_PR_SET_DUMPABLE = 4
_MADV_DONTDUMP = 16


def keep_out_of_dumps() -> dict[str, str]:
    """Of this process: no core file, and no reading of its memory by others of the same user."""
    return {
        "RLIMIT_CORE=0": _tried(lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))),
        "PR_SET_DUMPABLE=0": _tried(lambda: _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)),
    }


def lock_in_memory(secrets: Iterable[bytes]) -> dict[str, str]:
    """The pages where the `secrets` lie: not swapped out, not in a core file."""
    held = list(secrets)

    def each(name: str, *more: int) -> Callable[[], None]:
        def apply() -> None:
            for secret in held:
                start = id(secret) // mmap.PAGESIZE * mmap.PAGESIZE
                end = id(secret) + secret.__sizeof__()
                _call(name, ctypes.c_void_p(start), ctypes.c_size_t(end - start), *more)

        return apply

    return {
        "mlock": _tried(each("mlock")),
        "MADV_DONTDUMP": _tried(each("madvise", _MADV_DONTDUMP)),
    }


def _call(name: str, *values: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # libc, as the process has it
    if getattr(libc, name)(*values):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _tried(action: Callable[[], None]) -> str:
    try:
        action()
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        return f"failed: {reason}"
    return "done"
