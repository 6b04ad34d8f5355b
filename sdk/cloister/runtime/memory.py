"""What loading a bundle takes, and what the machine has: checked before, not found out after."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cloister.errors import NotEnoughMemory

if TYPE_CHECKING:
    from cloister.manifest import Manifest

__all__ = ["PROCESS_BYTES", "available_bytes", "check", "peak_bytes", "required_bytes"]

PROCESS_BYTES = 250_000_000  # interpreter and torch


def required_bytes(manifest: Manifest, *, methods: int = 1) -> int:
    """Memory that cannot be given back: weights as the backend packs them, KV, activations.

    XNNPACK packs the weights again for each method it loads; the file's own pages can be evicted
    and do not count.
    """
    return methods * manifest.weight_bytes + manifest.kv_bytes + manifest.arena_bytes


def available_bytes() -> int:
    """What this process may still take: the system's estimate, or its control group's limit."""
    free = [int(psutil.virtual_memory().available)]
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(free)


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
