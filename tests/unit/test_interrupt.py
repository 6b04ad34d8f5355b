"""Ctrl-C that is held back comes later, at once where it may, and once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from cloister.interrupt import uninterrupted


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_what_is_pressed_in_the_block_comes_after_it() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        press()
        press()
        done.append("all of it")
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_pressed_between_two_items_comes_before_the_next_one_is_taken() -> None:
    items, seen = iter("abc"), list[str]()
    with uninterrupted() as interrupts, pytest.raises(KeyboardInterrupt):
        for item in interrupts.interruptible(items):
            press()
            seen.append(item)
    assert seen == ["a"] and list(items) == ["b", "c"]


def test_what_is_pressed_while_an_item_is_waited_for_comes_at_once_and_the_next_is_held() -> None:
    cleaned: list[str] = []

    def wait() -> Iterator[str]:
        yield "a"
        try:
            press()
        finally:
            press()
            cleaned.append("all of it")

    def read() -> None:
        with uninterrupted() as interrupts:
            try:
                for item in interrupts.interruptible(wait()):
                    cleaned.append(item)
            finally:
                press()
                cleaned.append("and this")

    with pytest.raises(KeyboardInterrupt):
        read()
    assert cleaned == ["a", "all of it", "and this"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_ctrl_c_goes_on_doing_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        def wait() -> Iterator[str]:
            press()
            yield "a"

        with uninterrupted() as interrupts:
            seen = [(item, press()) for item in interrupts.interruptible(wait())]
        assert seen == [("a", None)]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_the_handler_alone() -> None:
    found: list[object] = []

    def elsewhere() -> None:
        with uninterrupted() as interrupts:
            found.extend([signal.getsignal(signal.SIGINT), *interrupts.interruptible("ab")])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler, "a", "b"]
