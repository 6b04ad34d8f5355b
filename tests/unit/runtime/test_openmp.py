"""OpenMP starts no threads while a program runs, and is as before when the last one is done."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloister.errors import IncompatibleProgram
from cloister.runtime._executorch import ExecutorchProgram

_OPENMP = ctypes.CDLL(None)
TOKENS = torch.ones(1, 1, dtype=torch.int64)


def _program(method: Any) -> ExecutorchProgram:
    return ExecutorchProgram(SimpleNamespace(load_method=lambda _: method), 1, "forward")


def _levels() -> int:
    return int(_OPENMP.omp_get_max_active_levels())


def test_calls_of_two_threads() -> None:
    before, seen = _levels(), list[int]()
    first_runs, second_done = threading.Event(), threading.Event()

    def first(_: list[torch.Tensor]) -> list[torch.Tensor]:
        first_runs.set()
        assert second_done.wait(30)
        seen.append(_levels())
        return [TOKENS]

    def second(_: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(_levels())
        return [TOKENS]

    other = threading.Thread(target=lambda: _program(first).forward(TOKENS, 0))
    other.start()
    assert first_runs.wait(30)
    _program(second).forward(TOKENS, 0)
    between = _levels()
    second_done.set()
    other.join()
    assert (*seen, between) == (0, 0, 0)
    assert _levels() == before > 0


def test_a_call_that_fails() -> None:
    def fails(_: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError

    before = _levels()
    with pytest.raises(IncompatibleProgram):
        _program(fails).forward(TOKENS, 0)
    assert _levels() == before
