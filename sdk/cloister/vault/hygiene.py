"""Keep keys from reaching a disk, as far as the system allows; each item says how it went.

Python cannot promise to wipe memory, and nothing here claims it: strings are copied and freed at
the interpreter's will.
"""

from __future__ import annotations

import ctypes
import mmap
import os

__all__ = ["LockedMemory"]

_DONTDUMP = 16


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
