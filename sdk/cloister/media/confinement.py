"""Give up what decoding does not need. There is no way back."""

from __future__ import annotations

import contextlib
import mmap
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.guard import keep_out_of_dumps, seccomp

if TYPE_CHECKING:
    from cloister.media.limits import Limits

__all__ = ["confine"]


def confine(limits: Limits) -> None:
    """Confine this process to what it has imported, its memory, and its open descriptors.

    Each measure is taken where the system has it: the package says what that leaves. To be called
    before the first byte of a file is read.
    """
    bounds = {"RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 0, "RLIMIT_NPROC": 0,
              "RLIMIT_CPU": limits.seconds + 1}  # should the process that asked be gone
    with contextlib.suppress(OSError):  # no /proc: it bounds no address space, either
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        bounds["RLIMIT_AS"] = pages * mmap.PAGESIZE + limits.memory_bytes
    keep_out_of_dumps()
    for name, most in bounds.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (most, most))
    with contextlib.suppress(OSError):
        seccomp.install(seccomp.COMPUTE)
