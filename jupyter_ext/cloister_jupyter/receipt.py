"""A bundle's receipt as plots and tables: measured numbers only, nothing that anyone typed.

One HTML fragment without script, style sheet or link, so that a saved notebook shows it as it was.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from cloister import family
from cloister.bundle import Bundle
from cloister.errors import CloisterError
from cloister.evaluate.scoreboard import is_score, ratios
from cloister.summary import html_table
from cloister.tiers import Tier
from cloister_jupyter.figures import KINDS, divergence, facts, scores, sizes
from cloister_jupyter.plots import Table, bars, dots, figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["ReceiptView"]

_BASE = Tier.PRO


class ReceiptView:
    """The receipt of a bundle, beside that of another one `against`, a baseline, where it is given.

    It shows the size of each layer, the divergence of the program from its checkpoint, the scores
    divided by those of the shipped Pro, and where all of that is from. Whatever a receipt does not
    tell is said to be missing.

    Raises:
        BundleError: see `cloister.bundle.Bundle.open`.
    """

    def __init__(
        self, bundle: Bundle | str | Path, against: Bundle | str | Path | None = None
    ) -> None:
        opened = [each if isinstance(each, Bundle) else Bundle.open(each)
                  for each in (bundle, against) if each is not None]
        names = [each.path.name.removesuffix(".cloister") for each in opened]
        if len(set(names)) < len(names):
            names = [f"{each.path.resolve().parent.name}/{name}"
                     for each, name in zip(opened, names, strict=True)]
        if len(set(names)) < len(names):
            names[1] += " (baseline)"
        self._bundles = dict(zip(names, opened, strict=True))

    def rows(self) -> list[tuple[str, ...]]:
        """Return names, each with its value for every bundle, in order."""
        columns = [facts(each) for each in self._bundles.values()]
        return [(cells[0][0], *(value for _, value in cells))
                for cells in zip(*columns, strict=True)]

    def __repr__(self) -> str:
        head = [] if len(self._bundles) == 1 else [f"bundle: {' | '.join(self._bundles)}"]
        return "\n".join([
            *head, *(f"{name}: {' | '.join(values)}" for name, *values in self.rows())])

    def _repr_mimebundle_(self, **_chosen: object) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.html()}

    def html(self) -> str:
        """Return the view as a fragment of HTML."""
        names = tuple(self._bundles)
        table = html_table(f"Receipt of {' and '.join(names)}", self.rows(), ("", *names))
        return (
            '<div style="display:grid;gap:8px 24px;align-items:start;'
            'grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))">'
            f"<div>{table}</div>\n{self._sizes()}\n{self._divergence()}\n"
            f"{self._scores()}\n</div>")

    def _sizes(self) -> str:
        found = {name: sizes(each.manifest) for name, each in self._bundles.items()}
        most = max(sum(parts) for rows in found.values() for _, parts in rows)
        drawn = []
        for name, rows in found.items():
            title = f"Bytes by layer, {name}"
            drawn.append(_with_table(
                bars(title, rows, KINDS, _bytes, most=most), title, ("", *KINDS, "sum"),
                [(place, *(f"{part:,.0f}" for part in (*parts, sum(parts))))
                 for place, parts in rows]))
        return "\n".join(drawn)

    def _divergence(self) -> str:
        found = {name: divergence(each.receipt()) for name, each in self._bundles.items()}
        cells = zip(*(each.quantiles for each in found.values()), strict=True)
        rows = [(row[0][0], [value for _, value in row]) for row in cells]
        title, drawn = "Divergence of the program from its checkpoint, nats a token", list[str]()
        if any(value is not None for _, row in rows for value in row):
            drawn.append(_with_table(
                dots(title, rows, list(found), _small, log=True), title, ("", *found),
                [(name, *map(_small, row)) for name, row in rows]))
        else:
            drawn.append(_missing(title, "the receipt has none; export the checkpoint again"))
        for name, each in found.items():
            title = f"Tokens by their divergence in nats, {name}"
            counted = [(place, (float(count),)) for place, count in each.histogram]
            drawn.append(_with_table(
                bars(title, counted, ("tokens",), _whole), title, ("nats", "tokens"),
                [(place, _whole(count)) for place, (count,) in counted],
            ) if counted else _missing(title, "the receipt does not have them"))
        return "\n".join(drawn)

    def _scores(self) -> str:
        title = f"Scores divided by {_BASE}'s"
        found = {name: scores(each.receipt()) for name, each in self._bundles.items()}
        try:
            base = scores(Bundle.open(family.bundle_path(_BASE)).receipt())[0]
        except CloisterError:
            base = {}  # a family that is not whole: every ratio is unknown
        wanted = [name for name in dict.fromkeys(
            name for values, _ in found.values() for name in values) if is_score(name)]
        if not wanted:
            return _missing(title, "the receipt has no scores; cloister eval --record adds some")
        ratio = [ratios({"": base, "this": values}, "")["this"] for values, _ in found.values()]
        rows = [(_score_name(name), [each.get(name) for each in ratio]) for name in wanted]
        return _with_table(
            dots(title, rows, list(found), _ratio, line=1.0), title,
            ("", *(f"{each}{what}" for each in found for what in ("", f" / {_BASE}")), str(_BASE)),
            [(shown, *(cell for (values, errors), each in zip(
                found.values(), row, strict=True) for cell in (
                    _score(values.get(name), errors.get(name)), _ratio(each))),
              _score(base.get(name), None))
             for name, (shown, row) in zip(wanted, rows, strict=True)])


def _with_table(
    drawn: tuple[str, str], title: str, head: tuple[str, ...], rows: Sequence[Sequence[str]]
) -> str:
    drawing, legend = drawn
    return figure(drawing, Table(caption=title, head=head, rows=rows), legend)


def _missing(title: str, why: str) -> str:
    return (f'<p style="min-width:0"><strong>{escape(title)}</strong>: not shown, '
            f"{escape(why)}.</p>")


def _bytes(value: float) -> str:
    return f"{value:,.0f} B" if value < 1e3 else f"{value / 1e3:,.1f} kB" if value < 1e6 else (
        f"{value / 1e6:,.2f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB")


def _small(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _score(value: float | None, error: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}" + (
        "" if error is None else f" ± {error:.3f}")


def _score_name(name: str) -> str:
    evaluation, _, score = name.rpartition(".")
    return f"{evaluation.removesuffix(', development')} {score.replace('_', ' ')}"
