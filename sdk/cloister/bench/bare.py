"""A bundle of random weights, written without the checks of an export and measured as it is.

Run as `python -m cloister.bench.bare BACKEND CHECKPOINT OUT [KV]`: one JSON object on the standard
output, with the time and memory that writing the program takes.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import bundle
from cloister.bench import process
from cloister.export import write
from cloister.manifest import FORMAT, Manifest
from cloister.model.checkpoint import Checkpoint
from cloister.runtime.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.manifest import ProgramEntry

__all__ = ["export_apart", "write_bundle"]


def write_bundle(
    source: Checkpoint, out: Path, program: Callable[[Path], ProgramEntry], chunk: int
) -> None:
    """Write a bundle of the program that `program` writes into a folder."""
    assert source.metadata.recipe is not None
    shape = source.metadata.config.shape
    with bundle.writer(out) as directory:
        entry = program(directory)
        for name in ("receipt.json", "golden.jsonl"):
            (directory / name).write_text("{}\n")
        (directory / "tokenizer.json").write_bytes(source.tokenizer_path.read_bytes())
        bundle.finish(directory, functools.partial(
            Manifest, format=FORMAT, name=out.stem, shape=shape, context=shape.context,
            prefill_chunk=chunk, recipe=source.metadata.recipe, executorch=write.release(),
            bos=None, eos=source.metadata.eos, programs=(entry,), special_ids=(),
            prompt_format=None, prompt_format_reason="not asked", modalities=("text",),
            parent="0" * 64,
        ))


def export_apart(
    backend: str, source: Path, out: Path, *, kv: str | None = None, debug: bool = False
) -> dict[str, Any]:
    """Write the bundle in a process of its own; return the seconds, and its most memory.

    Raises:
        WorkerError: the process failed.
    """
    return process.run("cloister.bench.bare", backend, str(source), str(out),
                       *filter(None, (kv,)), what=f"{backend} export", debug=debug)


def _main(backend: str, source: str, out: str, kv: str | None = None) -> None:
    taken = 0.0

    def program(directory: Path) -> ProgramEntry:
        nonlocal taken
        begun = time.perf_counter()
        entry = write.program(checkpoint, directory, backend=backend, kv=kv, chunk=chunk)
        taken = time.perf_counter() - begun
        return entry

    checkpoint = Checkpoint.open(source)
    chunk = min(write.DEFAULT_CHUNK, checkpoint.metadata.config.shape.context)
    write_bundle(checkpoint, Path(out), program, chunk)
    print(json.dumps({"convert_s": taken, "convert_peak_bytes": peak_bytes()}))  # noqa: T201


if __name__ == "__main__":
    _main(*sys.argv[1:])
