"""Whose turn it is: those who measure ask one after the other."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cloister.errors import NotEnoughMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.runtime.client import Worker

__all__ = ["TURN", "start", "take_turn"]

_LOOK_S = 0.01  # how often a wait looks whether it is to stop
TURN = threading.Lock()
"""Held by whoever asks: two at once would slow each other, and spoil the figures."""


def take_turn(stopping: threading.Event) -> bool:
    """Wait for TURN, and hold it; False where `stopping` came before."""
    while not stopping.is_set():
        if TURN.acquire(timeout=_LOOK_S):
            return True
    return False


def start(
    worker: Worker, stopping: threading.Event, free: Callable[[], None] = lambda: None,
) -> threading.Thread | None:
    """Start a worker, its bundle loaded. Where memory is short, after `free`.

    A bundle that is being loaded cannot be interrupted: where `stopping` comes before the end, the
    thread that goes on loading is returned.

    Raises:
        CloisterError: see `Worker.start`.
    """
    failures: list[BaseException] = []

    def load() -> None:
        try:
            try:
                worker.start()
            except NotEnoughMemory:
                free()
                worker.start()
        except BaseException as error:
            failures.append(error)

    loading = threading.Thread(target=load, daemon=True)
    loading.start()
    while loading.is_alive():
        loading.join(_LOOK_S)
        if stopping.is_set():
            return loading
    if failures:
        raise failures[0]
    return None
