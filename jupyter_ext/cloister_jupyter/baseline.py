"""What the receipts of two bundles say, side by side, and which of it speaks of a failure.

A receipt holds measured numbers only. Of each task that was evaluated it has the scores, and how
far the program diverges from its checkpoint there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloister.bundle import Bundle

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["WHOLE", "said", "side_by_side", "speaks_of"]

WHOLE = "program_against_checkpoint"
_EVALUATIONS = "evaluations"
_LOSSES = ("flips", "mean_kld", "top1")  # against the checkpoint; other metrics are scores
_TAILS = ("median_kld", "p99_kld", "p999_kld", "max_kld", "ppl_ratio", "relative_error")
_SHARES = (
    "frame_exact", "frame_said", "intent_accuracy", "oos_recall", "slot_f1", "exact", "flips",
    "top1")
_NONE = "\u2013"


def side_by_side(before: Path, after: Path) -> list[tuple[str, str, str]]:
    """Return names of what receipts say, and both bundles' values; a dash where one says nothing.

    Raises:
        BundleError: see `cloister.bundle.Bundle.open`.
    """
    one, other = said(before), said(after)
    return [(name, one.get(name, _NONE), other.get(name, _NONE)) for name in {**one, **other}]


def said(path: Path) -> dict[str, str]:
    """Return what a bundle says of itself by its place in the manifest or `receipt.json`."""
    bundle = Bundle.open(path)
    manifest, receipt = bundle.manifest, bundle.receipt()
    rows = {
        "tier": manifest.name, "recipe": manifest.recipe or "none",
        "size": f"{manifest.size_bytes:,} bytes", "context": f"{manifest.context:,} tokens",
        "checkpoint": str(_part(receipt, "weights").get("checkpoint", _NONE))[:12]}
    lost = _part(receipt, WHOLE)
    rows |= {f"{WHOLE}: {name}": _number(name, lost[name], lost.get(f"{name}_se"))
             for name in ("mean_kld", "top1") if name in lost}
    for task, scores in _part(receipt, _EVALUATIONS).items():
        metrics, errors = _part(scores, "metrics"), _part(scores, "errors")
        names = [name for name in metrics if name not in (*_LOSSES, *_TAILS)]
        rows |= {
            f"{_EVALUATIONS}: {task}: {name}": _number(name, metrics[name], errors.get(name))
            for name in (*names, *_LOSSES) if name in metrics}
    return rows


def speaks_of(names: Collection[str], task: str | None, fields: Collection[str]) -> str:
    """Return which name of `said` speaks of an answer to a task that fails in some fields of JSON.

    Of a task that was not evaluated: the divergence on the whole.
    """
    scores = [name for name in names if name.startswith(f"{_EVALUATIONS}: {task}")
              and name.split(": ")[1].split(",")[0] == task]
    wanted = "intent_accuracy" if "name" in fields else (
        "slot_f1" if any(field.split(".")[0] == "arguments" for field in fields) else "")
    found = [name for name in scores if name.endswith(f": {wanted}")] or scores
    return found[0] if found else f"{WHOLE}: mean_kld"


def _part(record: object, name: str) -> dict[str, Any]:
    """Return a part of a receipt; empty where it has none, as other releases write it."""
    part = record.get(name) if isinstance(record, dict) else None
    return part if isinstance(part, dict) else {}


def _number(name: str, value: object, error: object) -> str:
    if not isinstance(value, int | float):
        return _NONE
    if name == "mean_kld":
        return f"{value:.2g} nats a token"
    if name not in _SHARES:
        return f"{value:.3f}" + (f" \u00b1 {error:.3f}" if isinstance(error, int | float) else "")
    return f"{value:.1%}" + (f" \u00b1 {error:.1%}" if isinstance(error, int | float) else "")
