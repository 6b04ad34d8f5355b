"""A scoreboard of tiers, each score divided by one of theirs, as in Gemini's report."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["check_picture", "is_score", "ratios", "write_picture"]

# What is divided; divergences are not scores, and have no meaning as shares of another's.
HIGHER_IS_BETTER = (
    "exact", "frame_exact", "frame_said", "intent_accuracy", "oos_recall", "slot_f1")
LOWER_IS_BETTER = ("bits_per_byte", "cer", "wer")
KINDS = (".png", ".svg")


def is_score(name: str) -> bool:
    """Tell whether the metric called `name`, or `TASK.NAME`, is a score that can be divided."""
    return name.rpartition(".")[2] in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)


def ratios(metrics: Mapping[str, Mapping[str, float]], base: str) -> dict[str, dict[str, float]]:
    """Return each model's scores, by name, over those of `base`: above 1 is better than it."""
    divided: dict[str, dict[str, float]] = {}
    for model, scores in metrics.items():
        divided[model] = {}
        for name, value in scores.items():
            if not is_score(name):
                continue
            lower = name.rpartition(".")[2] in LOWER_IS_BETTER
            reference = metrics[base].get(name)
            above, below = (reference, value) if lower else (value, reference)
            if above is not None and below:
                divided[model][name] = above / below
    return divided


def check_picture(path: Path) -> None:
    """Raise SettingError unless matplotlib is there and can draw into `path`; before long work."""
    if find_spec("matplotlib") is None:
        raise SettingError('Pictures need matplotlib; run pip install "cloister[train]".')
    if path.suffix.lower() not in KINDS:
        raise SettingError(f"{path.name} is no picture file; use {' or '.join(KINDS)}.")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise SettingError(
            f"Picture {path.name} has no directory to lie in, or is one; name another file."
        )


def write_picture(path: Path, metrics: Mapping[str, Mapping[str, float]], base: str) -> None:
    """Draw `ratios` as groups of bars, into a file of the kind that its name says.

    Raises:
        SettingError: see `check_picture`; or the file cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    divided = ratios(metrics, base)
    names = list(dict.fromkeys(name for scores in divided.values() for name in scores))
    figure = Figure(figsize=(2 + 1.6 * len(names), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(divided)
    for number, (model, scores) in enumerate(divided.items()):
        bars = axes.bar(
            [at + (number + 0.5) * width - 0.4 for at in range(len(names))],
            [scores.get(name, 0.0) for name in names], width, label=model,
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.replace(".", "\n") for name in names])
    axes.set_ylabel(f"divided by {base}")
    axes.legend(loc="lower left", fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SettingError(
            f"Picture {path.name} cannot be written ({error.strerror}); name another file."
        ) from None
