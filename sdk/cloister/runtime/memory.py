"""What loading a bundle takes, and what the machine has: checked before, not found out after."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cloister.errors import NotEnoughMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PROCESS_BYTES", "available_bytes", "check", "peak_bytes"]

PROCESS_BYTES = 250_000_000  # interpreter and torch


_GROUP_FILES = (  # limit, use, and the file pages counted in it that can be evicted
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take: the least of the system and of each control group above.

    Evictable file pages are free, as in the system's own estimate: hashing a program fills a
    group with them just before it is loaded. `root` is where the system's files are found.
    """
    free = [int(psutil.virtual_memory().available)]
    for group in _groups(root):
        for limit, used, cache in _GROUP_FILES:
            try:
                stat = dict(line.split() for line in (group / "memory.stat").open())
                free.append(
                    int((group / limit).read_text()) - int((group / used).read_text())
                    + int(stat[cache])
                )
            except (OSError, ValueError, KeyError):  # no such group, or "max"
                continue
    return min(free)


def _groups(root: Path) -> Iterator[Path]:
    """Control groups that hold this process, versions 1 and 2: each of them limits it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controller, path = line.split(":", 2)
        if controller in ("", "memory"):
            base = root / "sys/fs/cgroup" / controller
            group = base / path.lstrip("/")
            yield from (each for each in (group, *group.parents) if each.is_relative_to(base))


def check(name: str, required: int, available: int) -> None:
    """Raise NotEnoughMemory, with both numbers, if `required` bytes are not `available`."""
    if required > available:
        raise NotEnoughMemory(
            f"Loading {name} takes {required / 1e9:.2f} GB and {available / 1e9:.2f} GB are "
            "available; close other programs or take a smaller tier."
        )


def peak_bytes() -> int:
    """Most memory that this process held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started us
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
