"""Ctrl-C, held back while what it would leave half done is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

__all__ = ["Interrupts", "uninterrupted"]

_T = TypeVar("_T")


class Interrupts:
    """The interrupts of a block; made by `uninterrupted`."""

    def __init__(self) -> None:
        self.pressed = False  # while it was held back
        self.before: Callable[[int, FrameType | None], Any] | int | None = None  # the handler
        self._waiting = False

    def interruptible(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield `items`; Ctrl-C comes while the next one is waited for, and nowhere else.

        An item that arrives at the same moment may be lost to it.
        """
        left = iter(items)
        while True:
            self._waiting = True
            if self.pressed:
                self.pressed = False
                signal.raise_signal(signal.SIGINT)
            try:
                item = next(left)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def press(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if self._waiting and callable(self.before):
            self._waiting = False  # a second one must not hit what the first one brings about
            self.before(number, frame)
        else:
            self.pressed = True


@contextlib.contextmanager
def uninterrupted() -> Iterator[Interrupts]:
    """Hold back Ctrl-C until the block has ended, so that nothing is left half done."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    interrupts.before = signal.signal(signal.SIGINT, interrupts.press)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, interrupts.before or signal.default_int_handler)
        if interrupts.pressed:
            signal.raise_signal(signal.SIGINT)
