"""Ctrl-C at every point where the interpreter could notice it."""

from __future__ import annotations

import dis
import signal
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


@cache
def _offsets(code: CodeType) -> frozenset[int]:
    """Offsets before which the interpreter looks for signals: after calls and jumps back."""
    before, found = "RESUME", set[int]()
    for step in dis.get_instructions(code):
        if before in ("RESUME", "JUMP_BACKWARD") or before.startswith("CALL"):
            found.add(step.offset)
        if step.opname != "CACHE":
            before = step.opname
    return frozenset(found)


class Interrupt:
    """Sends the signal of Ctrl-C at the points of the files `watched` which have these places."""

    def __init__(self, watched: Collection[str], *places: int) -> None:
        self.watched, self.places, self.passed, self.where = watched, places, 0, ""

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if Path(frame.f_code.co_filename).name not in self.watched:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in _offsets(frame.f_code):
            self.passed += 1
            if self.passed in self.places:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._trace
