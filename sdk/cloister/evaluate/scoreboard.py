"""Tiers side by side, each score also divided by that of one of them, as Gemini's report has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["ratios", "write_picture"]

LOWER_IS_BETTER = ("bits_per_byte",)


def ratios(
    metrics: Mapping[str, Mapping[str, float]], base: str
) -> dict[str, dict[str, float]]:
    """Each model's scores, by name, as shares of those of `base`: above 1 is better than it."""
    divided: dict[str, dict[str, float]] = {}
    for model, scores in metrics.items():
        divided[model] = {}
        for name, value in scores.items():
            reference = metrics[base].get(name)
            lower = name.rpartition(".")[2] in LOWER_IS_BETTER
            above, below = (reference, value) if lower else (value, reference)
            if above is not None and below:
                divided[model][name] = above / below
    return divided


def write_picture(
    path: Path, metrics: Mapping[str, Mapping[str, float]], base: str
) -> None:
    """Draw `ratios` as groups of bars, into a file of the kind that its name says.

    Raises:
        SettingError: matplotlib is not installed, or knows no such kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingError(
            'Pictures need matplotlib; run pip install "cloister[train]".'
        ) from None
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
    except ValueError:
        raise SettingError(
            f"{path.name} is no picture file that matplotlib knows; use .png or .svg."
        ) from None
