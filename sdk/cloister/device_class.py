"""What a bundle takes on a class of devices, as far as it can be found out without one.

Memory and cold start come of a process of this machine under the limit that an app has there;
instructions a token of an emulated processor, and are never turned into seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping  # noqa: TC003  # read at run time
from typing import TYPE_CHECKING, Any

from cloister import records
from cloister.bundle import rewrite_receipt
from cloister.display import bytes_text
from cloister.errors import DataError, NotEnoughMemory
from cloister.evaluate.limited import cold_start
from cloister.records import Finite, Label, Record, Sha256
from cloister.runtime import memory
from cloister.runtime.program import runs_here
from cloister.settings import processor
from cloister.tiers import DEVICES

if TYPE_CHECKING:
    from pathlib import Path

    from cloister.bundle import Bundle
    from cloister.settings import Settings

__all__ = ["CLASSES", "Counts", "cells", "instructions", "measure", "write"]

CLASSES = ("phone 4 GB", "phone 6 GB", "phone 8 GB")
MOST_APART = 1e-4  # of instructions a token, between repeats
_LIMIT_BYTES = 1 << 16


class Counts(Record, frozen=True):
    """Instructions a token of each repeat, by emulated processor."""

    program: Sha256  # that was run
    emulator: Label
    tokens: int  # a repeat
    processors: Mapping[str, tuple[Finite, ...]]


def measure(bundle: Bundle, settings: Settings, *, debug: bool = False) -> dict[str, Any]:
    """Return what `bundle` needs, and what came of starting it under the limit of each class.

    Raises:
        BundleError: there is no program for this machine, or it is not what the manifest says.
        WorkerError: a process failed.
    """
    entry = bundle.program(runs_here)
    bundle.check_program(entry, settings)  # a first start would hash it, a cold one does not
    required = entry.required_bytes(bundle.manifest.shape)
    rows = []
    for name in CLASSES:
        row: dict[str, Any] = {"class": name, "limit_bytes": DEVICES[name]}
        try:
            memory.check(bundle.path.name, required, DEVICES[name])
        except NotEnoughMemory as error:
            rows.append({**row, "runs": False, "why": str(error)})
            continue
        found = cold_start(bundle.path, DEVICES[name], debug=debug)
        rows.append({**row, **(found or {
            "runs": None, "why": "no control group can be made here, so it was not started"})})
    return {
        "backend": entry.backend, "required_bytes": required, "measured_on": processor(),
        "process": "Python with torch, where a phone has neither", "classes": rows,
    }


def instructions(bundle: Bundle, path: Path) -> dict[str, Any]:
    """Return the counts in `path`, with mean and spread by processor.

    Raises:
        DataError: they are malformed, of another program, or further apart than MOST_APART.
    """
    def refuse(complaint: str) -> DataError:
        return DataError(f"{path.name} has no counts for this bundle ({complaint.rstrip('.')}); "
                         "run tests/campaigns/phone/budget.py on it again.")

    try:
        raw = path.read_bytes()
    except OSError:
        raise refuse("it cannot be read") from None
    counts = records.build(
        records.parse(raw, limit_bytes=_LIMIT_BYTES, refuse=refuse), Counts, refuse=refuse)
    if counts.program not in {
            bundle.manifest.files[entry.file].sha256 for entry in bundle.manifest.programs}:
        raise refuse("they are of another program")
    found = {}
    for name, repeats in counts.processors.items():
        if len(repeats) < 2 or not name.isprintable() or min(repeats) <= 0:
            raise refuse("a processor has no two repeats")
        mean = statistics.fmean(repeats)
        spread = (max(repeats) - min(repeats)) / mean
        if not spread <= MOST_APART:
            raise refuse(f"repeats are {spread:.1e} apart")
        found[name] = {"mean": mean, "spread": spread, "repeats": len(repeats)}
    return {"emulator": counts.emulator, "tokens": counts.tokens, "processors": found}


def write(bundle: Bundle, found: dict[str, Any]) -> Bundle:
    """Put what was found into the receipt of `bundle`; its model id stays.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.bundle.writer`; the bundle is as before.
    """
    return rewrite_receipt(bundle, {**bundle.receipt(), "device_classes": found})


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row of `measure`, for a table."""
    limit = bytes_text(row["limit_bytes"])
    if not row["runs"]:
        peak = bytes_text(row["peak_bytes"]) if "peak_bytes" in row else ""
        return row["class"], limit, f"no: {row['why']}" if row["runs"] is False else row["why"], \
            peak, "", ""
    return (row["class"], limit, "yes", bytes_text(row["peak_bytes"]),
            f"{row['cold_start_s']:.1f} s", f"{row['page_faults_per_token']:.1f}")
