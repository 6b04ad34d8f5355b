"""Time by operator of a program of Cloister's own operators, measured in a process of its own.

Run as `python -m cloister.evaluate.profile BUNDLE`: one JSON object on the standard output.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from cloister.backend import CLOISTER
from cloister.bundle import Bundle
from cloister.errors import IncompatibleProgram, KernelsUnavailable
from cloister.evaluate.speed import POSITIONS, PREFILLS, STEPS
from cloister.runtime.program import load, own_operators, timed_operators

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloister.manifest import ProgramEntry
    from cloister.runtime.program import Program

__all__ = ["KINDS", "measure", "profiled"]

KINDS = ("qkv", "attention", "o", "gate_up", "down", "head", "embedding", "norm", "other")
"""Matrix products by matrix, and the other operators; `other` is what remains of the time."""


def profiled(bundle: Bundle) -> ProgramEntry:
    """Return the program of `bundle` that can be profiled.

    Raises:
        IncompatibleProgram: none is of Cloister's own operators.
    """
    for entry in bundle.manifest.programs:
        if entry.backend == CLOISTER.name and entry.operator_abi == CLOISTER.operator_abi:
            return entry
    raise IncompatibleProgram(
        f"Bundle {bundle.path.name} has no program that can be profiled; export it with --backend "
        f"{CLOISTER.name} (XNNPACK tells no times by operator).")


def measure(
    path: str | Path, *, prefills: Sequence[int] = PREFILLS, positions: Sequence[int] = POSITIONS,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Return the seconds of each of KINDS, and `all` together.

    Of prefills of so many tokens, and of decoding a token after each position: a mean of `steps`.

    Raises:
        IncompatibleProgram: see `profiled`.
        KernelsUnavailable: the operators cannot be built or loaded here.
    """
    bundle = Bundle.open(path)
    manifest, entry = bundle.manifest, profiled(bundle)
    operators = own_operators()
    if isinstance(operators, KernelsUnavailable):
        raise operators
    program = load(bundle.path / entry.file, manifest.shape.layers)
    chunk, context = manifest.prefill_chunk, manifest.context
    _read(program, 0, chunk, chunk)
    prefill = {str(length): _read(program, 0, length, chunk)
               for length in prefills if length <= context}
    decode, filled = {}, 0
    for position in positions:
        if position + steps <= context:
            _read(program, filled, position, chunk)
            filled = position
            taken = _read(program, position, position + steps, 1)
            decode[str(position)] = {kind: time_s / steps for kind, time_s in taken.items()}
    return {"instruction_set": operators.chosen, "prefill_s": prefill, "decode_s": decode}


def _read(program: Program, begin: int, end: int, chunk: int) -> dict[str, float]:
    """Read positions in calls of at most `chunk`, and return seconds by kind."""
    taken = dict.fromkeys(("all", *KINDS), 0.0)
    for start in range(begin, end, chunk):
        tokens = torch.ones(1, min(chunk, end - start), dtype=torch.int64)
        total = 0.0

        def forward(tokens: torch.Tensor = tokens, start: int = start) -> None:
            nonlocal total
            began = time.perf_counter()
            program.forward(tokens, start)
            total = time.perf_counter() - began

        calls = timed_operators(forward)
        kinds = _kinds([name for name, _ in calls])
        for kind, (_, time_s) in zip(kinds, calls, strict=True):
            taken[kind] += time_s
        taken["other"] += total - sum(time_s for _, time_s in calls)
        taken["all"] += total
    return taken


def _kinds(names: Sequence[str]) -> list[str]:
    """Return which of KINDS each operator of a call of `forward` is, from their order."""
    kinds, normed = [], "qkv"
    for name in names:
        if name == "attention":
            normed = "gate_up"
        kinds.append({
            "linear": "o", "linear, normed": normed, "linear, gated": "down"}.get(name, name))
        if kinds[-1] == "down":
            normed = "qkv"
    last = max(place for place, name in enumerate(names) if name.startswith("linear"))
    kinds[last] = "head"
    return kinds


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))  # noqa: T201
