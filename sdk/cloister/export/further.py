"""Further programs of a bundle, for backends that are not on the machine that exports.

Beside a program of Cloister's own operators XNNPACK's is one, too; that is run and proved.

What is measured is the graph that a backend is given; the program was never run, and its entry and
its part of the receipt say so.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from cloister.backend import CLOISTER, COREML, FURTHER, NEVER_RUN, XNNPACK
from cloister.errors import ExportMismatch, SettingError
from cloister.export import check, write
from cloister.export.backends import partitioned
from cloister.manifest import ProgramEntry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloister.model.checkpoint import Checkpoint, Metadata

__all__ = ["TOKENS", "check_names", "program"]

TOKENS = 64  # that the graph is compared on, one call each
BOUND = 0.1  # nats a token: activations are not rounded, those of the checkpoint are


def check_names(metadata: Metadata, first: str, names: Sequence[str]) -> None:
    """Check that a bundle may hold programs for the backends `first` and `names`.

    Beside a program of Cloister's own operators XNNPACK's is one of them: it runs where these
    cannot be built.

    Raises:
        SettingError: one of `names` is no further backend, or given twice.
        ExportError: a backend cannot hold the blocks that the checkpoint keeps.
    """
    possible = [*FURTHER, *([XNNPACK.name] if first == CLOISTER.name else [])]
    for name in names:
        if name not in possible or names.count(name) > 1:
            raise SettingError(
                f"A bundle holds no further program for {name!r}, or not twice; choose of "
                f"{', '.join(possible)}.")
    write.check_kept(metadata, (first, *names))


def program(
    source: Checkpoint, directory: Path, backend: str, *, chunk: int, ids: list[int],
    compare: check.Compare,
) -> tuple[ProgramEntry, dict[str, object]]:
    """Write the program for `backend` into `directory`; return its entry and its receipt.

    Raises:
        ExportError: the backend's exporter is not installed, or the graph is not the checkpoint's.
    """
    metadata, shape = source.metadata, source.metadata.config.shape
    most = write.longest(metadata.config, chunk)
    chunk, ids = partitioned.chunk_of(backend, most), ids[:TOKENS]
    reading = check.Reading(source.load(), [ids])
    traced = partitioned.trace(source.load(), chunk)
    found = check.measure(
        functools.partial(partitioned.score, traced), [ids], reading, compare,
    ).program_from_checkpoint
    if not found.mean_kld <= BOUND:
        raise ExportMismatch(
            f"The graph for {backend} is {found.mean_kld:.2g} nats a token from the checkpoint, "
            f"the bound is {BOUND}; nothing was written, report it.")
    # Without dynamic shapes the runner reads token by token, whatever the most of a call is said to
    # be; said to be the context, it counts against that.
    manager = partitioned.lower(traced, backend, {
        **write.constants(metadata, shape.context if chunk == 1 else most),
        "enable_dynamic_shape": chunk > 1})
    path = directory / f"program.{backend}.pte"
    with path.open("wb") as file:
        manager.write_to_file(file)
    delegates, outside = partitioned.outside(manager)
    planned = sum(manager.executorch_program.execution_plan[0].non_const_buffer_sizes)
    chosen = FURTHER[backend]
    kv = chosen.kv_of(None)
    kv_bytes = shape.context * shape.kv_bytes_per_token(kv)
    arena_bytes = planned - (0 if chosen is COREML else kv_bytes)  # Core ML's states are its own
    return ProgramEntry(
        file=path.name, backend=backend, methods=chosen.methods, note=NEVER_RUN,
        operator_abi=chosen.operator_abi, weight_bytes=path.stat().st_size, kv_bytes=kv_bytes,
        arena_bytes=arena_bytes, kv=kv,
    ), {
        "backend": backend, "note": NEVER_RUN, "delegate_calls": delegates,
        "operators_outside": outside, "tokens_a_call": chunk,
        "graph_against_checkpoint": {**found.to_dict(), "histogram": dict(found.histogram)},
    }
