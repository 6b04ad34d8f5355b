"""What runs beside the kernel's own threads, so that no handler waits."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["BATCH_S", "WARM_S", "Idle", "every"]

BATCH_S = 0.04  # an eye sees no steps, and a fast tier sends few messages
WARM_S = 600.0  # after which processes that nobody asks give their memory back


class Idle:
    """Does `work` once `begin` was not called for `after_s`."""

    def __init__(self, after_s: float, work: Callable[[], None]) -> None:
        self._after_s, self._work = after_s, work
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """Wait from now on."""
        self.cancel()
        self._timer = threading.Timer(self._after_s, self._work)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def every(period_s: float, work: Callable[[], None]) -> Iterator[None]:
    """Do `work` on a thread again and again while the block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(period_s):
            work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
