"""Keep this process's memory out of core files, and from other processes of the user."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["keep_out_of_dumps"]

_PR_SET_DUMPABLE = 4


def keep_out_of_dumps() -> dict[str, str]:
    """Allow this process no core file, and other processes of the user no look into its memory.

    To be called before anything private is read; more than once does no harm. Return how each
    measure went.
    """
    return {
        "RLIMIT_CORE=0": _tried(lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))),
        "PR_SET_DUMPABLE=0": _tried(_refuse_to_be_read),
    }


def _refuse_to_be_read() -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # libc, as the process has it
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _tried(action: Callable[[], None]) -> str:
    try:
        action()
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        return f"failed: {reason}"
    return "done"
