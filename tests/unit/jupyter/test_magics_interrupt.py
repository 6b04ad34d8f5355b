"""The answer under a cell is shown once and in order, at whatever moment it is interrupted."""

from __future__ import annotations

import io
import itertools
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from tests.interrupts import Interrupt

from cloister.runtime.chat import Ask, Token
from cloister_jupyter import magics

WATCHED = ("magics.py", "interrupt.py", "display.py", "contextlib.py")
WORDS = ["now", "and", "then", "a", "ferry"]


class Screen(io.StringIO):
    """Standard output; Ctrl-C comes as its `at`-th write or flush has done its work."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def _done(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)

    def write(self, text: str) -> int:
        count = super().write(text)
        self._done()
        return count

    def flush(self) -> None:
        self._done()


class Cell:
    """An answer of `WORDS`, and what became of it."""

    def __init__(self, patch: pytest.MonkeyPatch, screen: Screen, *places: int) -> None:
        """Show it on `screen`, with Ctrl-C at those points of the code."""
        self.taken = 0
        self.said: list[str] = []
        self.interrupted = False
        clock = SimpleNamespace(monotonic=itertools.count().__next__)  # about two words a write
        with patch.context() as patched, Interrupt(WATCHED, *places) as self.at:
            patched.setattr(magics, "time", clock)
            patched.setattr(magics, "_BATCH_S", 1.5)
            patched.setattr(sys, "stdout", screen)
            try:
                magics._stream(self, Ask.of("once"), self.said)  # type: ignore[arg-type]
            except KeyboardInterrupt:
                self.interrupted = True
        self.shown = screen.getvalue()
        assert self.said == WORDS[:len(self.said)]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def answer(self, ask: Ask) -> Iterator[Token]:
        for word in WORDS:
            self.taken += 1
            yield Token(self.taken, word, -1.0)


def test_an_answer_is_shown_once_where_a_write_or_its_flush_is_interrupted(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Screen()
    assert Cell(monkeypatch, whole).shown == "".join(WORDS) + "\n"
    assert whole.calls > 6
    for at in range(1, whole.calls + 1):
        cell = Cell(monkeypatch, Screen(at))
        assert cell.interrupted and cell.shown == "".join(cell.said) + "\n", at
        assert len(cell.said) == cell.taken


def test_an_answer_is_shown_once_wherever_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    total = Cell(monkeypatch, Screen()).at.passed
    assert total > 30
    for first in range(1, total + 1):
        for second in (first, first + 1, first + 5):  # one Ctrl-C, or two
            cell = Cell(monkeypatch, Screen(), first, second)
            assert cell.interrupted, cell.at.where
            assert cell.taken - len(cell.said) <= 1, cell.at.where  # what came just then
            nothing = cell.taken == 0 and not cell.shown
            assert nothing or cell.shown == "".join(cell.said) + "\n", cell.at.where
