"""Keep memory from reaching a disk, as far as the system allows; each item says how it went.

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
    from collections.abc import Callable

__all__ = ["LockedMemory", "keep_out_of_dumps"]

_PR_SET_DUMPABLE = 4
_DONTDUMP = 16


def keep_out_of_dumps() -> dict[str, str]:
    """Allow this process no core file, and other processes of the user no look into its memory.

    To be called before anything private is read; more than once does no harm.
    """
    return {
        "RLIMIT_CORE=0": _tried(lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))),
        "PR_SET_DUMPABLE=0": _tried(lambda: _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)),
    }


class LockedMemory:
    """Pages with keys on them: not swapped out, not in a core file."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._how = {"mlock": "done", "MADV_DONTDUMP": "done"}
        self._calls = (("mlock", libc.mlock, ()), ("MADV_DONTDUMP", libc.madvise, (_DONTDUMP,)))

    def lock(self, key: bytes) -> bytes:
        """Lock the pages where `key` lies, and return it."""
        start = id(key) // mmap.PAGESIZE * mmap.PAGESIZE
        size = id(key) + key.__sizeof__() - start
        for name, call, more in self._calls:
            if call(ctypes.c_void_p(start), ctypes.c_size_t(size), *more):
                self._how[name] = f"failed: {os.strerror(ctypes.get_errno())}"
        return key

    def report(self, keys: int) -> dict[str, str]:
        """Say how it went for all that was ever locked, `keys` of which are in memory now."""
        return {name: f"{how} ({keys} keys)" for name, how in self._how.items()}


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
