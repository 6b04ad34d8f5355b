"""Speed and memory of a bundle on this machine, measured in a process of its own.

Run as `python -m cloister.evaluate.speed BUNDLE`: one JSON object on the standard output.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import psutil
import torch

from cloister.backend import CLOISTER
from cloister.bundle import Bundle
from cloister.runtime.program import Operators, load, own_operators, runs_here

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cloister.manifest import Manifest, ProgramEntry
    from cloister.runtime.program import Program

__all__ = ["bandwidth", "measure", "read_bytes"]

PREFILLS = (128, 512)  # tokens
POSITIONS = (0, 100, 1000, 1900)  # tokens already read
STEPS = 16  # decode steps a position, of which the median counts


def bandwidth() -> float:
    """Measure how fast memory is read here, bytes a second: the best of five sums over 1 GiB."""
    block = torch.ones(2**28)
    block.sum()
    return block.nbytes / min(_timed(lambda: block.sum()) for _ in range(5))


def read_bytes(manifest: Manifest, entry: ProgramEntry, position: int) -> int:
    """Return the bytes that decoding a token at `position` reads: weights, and the KV so far.

    Of the embedding it reads one row.
    """
    shape = manifest.shape
    kind = manifest.recipe.partition("-e")[2]  # of an embedding that is no 8-bit one
    if shape.tied:  # the head reads all of it
        embedding = 0
    elif kind in ("", "4"):
        embedding = shape.vocab_size * shape.hidden_size * (5 if kind else 8) // 8
    else:
        from cloister.model.blocks import Blocks  # what a measured process need not hold

        embedding = shape.vocab_size * Blocks(kind=kind.upper()).row_bytes(shape.hidden_size)
    return entry.weight_bytes - embedding + position * entry.kv_bytes // shape.context


def measure(
    path: str | Path, *, prefills: Sequence[int] = PREFILLS, positions: Sequence[int] = POSITIONS,
    steps: int = STEPS,
) -> dict[str, object]:
    """Measure load time, memory, prefill and decode speed of the bundle in `path`.

    Decode speed at a position is the median of `steps` steps after filling the cache that far;
    prefill, of so many tokens each, the median of 3. Memory is read after all of them.
    """
    bundle, empty = Bundle.open(path), _anonymous()
    manifest, entry = bundle.manifest, bundle.program(runs_here)
    operators = own_operators() if entry.backend == CLOISTER.name else None
    began = time.perf_counter()
    program = load(bundle.path / entry.file, manifest.shape.layers)
    load_s = time.perf_counter() - began
    first_s = _timed(lambda: _feed(program, manifest, 0, 1))
    prefill = {
        str(length): length / statistics.median(
            _timed(partial(_feed, program, manifest, 0, length)) for _ in range(3)
        )
        for length in prefills if length <= manifest.context
    }
    limit, decode, fraction = bandwidth(), {}, {}
    filled = 0
    for position in positions:
        if position + steps > manifest.context:
            continue
        _feed(program, manifest, filled, position)
        filled = position
        step_s = statistics.median(
            _timed(partial(_feed, program, manifest, position + step, position + step + 1))
            for step in range(steps)
        )
        decode[str(position)] = 1 / step_s
        fraction[str(position)] = read_bytes(manifest, entry, position) / step_s / limit
    return {
        "backend": entry.backend,
        "instruction_set": operators.chosen if isinstance(operators, Operators) else None,
        "load_s": load_s,
        "first_token_s": first_s,
        "rss_bytes": psutil.Process().memory_info().rss,
        "anon_bytes": _anonymous(),
        "empty_bytes": empty,  # before the program and its operators were loaded
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "bandwidth_bytes_per_s": limit,
        "fraction_of_limit": fraction,
    }


def _anonymous() -> int:
    """Return the bytes that this process holds and no file has."""
    memory = psutil.Process().memory_info()
    held: int = memory.rss - memory.shared
    return held


def _feed(program: Program, manifest: Manifest, begin: int, end: int) -> None:
    for start in range(begin, end, manifest.prefill_chunk):
        tokens = torch.ones(1, min(manifest.prefill_chunk, end - start), dtype=torch.int64)
        program.forward(tokens, start)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))  # noqa: T201
