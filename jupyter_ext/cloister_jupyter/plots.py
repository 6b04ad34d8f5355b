"""Plots as inline SVG: rows of bars or of marks, with their numbers in a table that folds out.

Nothing is loaded and no script is needed. Text and lines have the colour of the text around them;
fills are JupyterLab's where there are its variables. What a colour says a shape or an outline says,
too. Where a host strips SVG, title, description and table stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from cloister.summary import html_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Table", "bars", "dots", "figure"]

_WIDTH, _LABEL, _VALUE, _ROW, _CHAR = 520, 190, 70, 18, 5.7  # units of an SVG, about pixels
_FILLS = (  # of a kind: colour, how much of it, and the dashes of its outline
    ("var(--jp-brand-color1, #1976d2)", 0.85, ""),
    ("var(--jp-warn-color1, #e08600)", 0.35, ""),
    ("var(--jp-success-color1, #388e3c)", 0.6, "2 2"),
    ("currentColor", 0.15, ""),
)
_LINE = 'stroke="currentColor" stroke-width="0.75"'


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers as text: the first cell of a row is its name."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def figure(drawing: str, table: Table, legend: str = "") -> str:
    """Return a drawing under its title, with its numbers folded away."""
    numbers = html_table(table.caption, table.rows, table.head)
    return (
        f'<figure style="margin:0 0 12px;min-width:0;max-width:{_WIDTH + 60}px">'
        f"<figcaption><strong>{escape(table.caption)}</strong>{legend}</figcaption>"
        # Of what is stripped the texts would stand there in one heap.
        f'<div style="font-size:0px">{drawing}</div>'
        f"<details><summary>The numbers</summary>{numbers}</details></figure>")


def bars(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], kinds: Sequence[str],
    text: Callable[[float], str], *, most: float | None = None, label: int = _LABEL,
) -> tuple[str, str]:
    """Draw a bar a row, a part of it for each of the kinds, and return it with its legend.

    `most` is the value of the longest bar that there could be, the longest row's by default.
    """
    most = most or max((sum(parts) for _, parts in rows), default=0) or 1.0
    unit, drawn = (_WIDTH - label - _VALUE) / most, list[str]()
    for number, (name, parts) in enumerate(rows):
        top, left = number * _ROW, float(label)
        drawn.append(_text(label - 8, top, name, "end", label))
        for kind, (part, value) in enumerate(zip(kinds, parts, strict=True)):
            width = value * unit
            if value:
                drawn.append(
                    f'<rect x="{left:.1f}" y="{top + 2}" width="{max(width, 0.5):.1f}" height='
                    f'"{_ROW - 4}" {_fill(kind)}><title>{escape(f"{name}, {part}: {text(value)}")}'
                    "</title></rect>")
            left += width
        drawn.append(_text(left + 6, top, text(sum(parts)), "start"))
    longest = max(rows, key=lambda row: sum(row[1]), default=("nothing", ()))
    says = f"{len(rows)} rows; the longest is {longest[0]}, {text(sum(longest[1]))}."
    return _svg(title, says, len(rows) * _ROW, drawn), _legend(kinds, _swatch)


def dots(
    title: str, rows: Sequence[tuple[str, Sequence[float | None]]], series: Sequence[str],
    text: Callable[[float], str], *, log: bool = False, line: float | None = None,
) -> tuple[str, str]:
    """Draw a mark a row for each of the series, and return it with its legend.

    `line` is a value that has an upright line. A series that has no value in a row has no mark.
    """
    def place(value: float) -> float:
        return math.log10(max(value, 1e-16)) if log else value

    known = [place(value) for _, values in rows for value in values if value is not None]
    known += [] if line is None else [place(line)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    room = _WIDTH - _LABEL - _VALUE * len(series) - 20
    drawn, end = list[str](), len(rows) * _ROW

    def at(value: float) -> float:
        return _LABEL + 8 + (place(value) - low) / (high - low) * room

    if line is not None:
        drawn.append(f'<line x1="{at(line):.1f}" x2="{at(line):.1f}" y1="0" y2="{end}" {_LINE}/>')
    for number, (name, values) in enumerate(rows):
        middle = number * _ROW + _ROW / 2
        drawn.append(_text(_LABEL - 8, number * _ROW, name, "end", _LABEL))
        drawn.append(f'<line x1="{_LABEL}" x2="{_LABEL + 16 + room}" y1="{middle}" y2="{middle}" '
                     'stroke="currentColor" stroke-width="0.4" stroke-dasharray="1 3"/>')
        for which, value in enumerate(values):
            said = "\N{EN DASH}" if value is None else text(value)
            if value is not None:
                beside = 5 * (which - (len(values) - 1) / 2)  # each other, where they are equal
                drawn.append(_mark(
                    which, at(value), middle + beside, f"{name}, {series[which]}: {said}"))
            drawn.append(_text(_LABEL + room + 24 + which * _VALUE, number * _ROW, said, "start"))
    says = "; ".join(
        f"{name}: {' and '.join('unknown' if each is None else text(each) for each in values)}"
        for name, values in rows)
    return _svg(title, f"{says}.", end, drawn), (
        _legend(series, lambda which: _icon(_mark(which, 6, 6))) + (
            "" if line is None else f"; the line is at {text(line)}"))


def _svg(title: str, says: str, height: int, drawn: Sequence[str]) -> str:
    body = "\n".join(drawn)  # a space between the texts, where the elements around are stripped
    return (
        f'<svg role="img" viewBox="0 0 {_WIDTH} {height}" xmlns="http://www.w3.org/2000/svg" '
        f'style="width:100%;max-width:{_WIDTH + 60}px;color:inherit;font:11px system-ui,sans-serif"'
        f">\n<title>{escape(title)}</title>\n<desc>{escape(says)}</desc>\n{body}\n</svg>")


def _text(x: float, top: float, text: str, anchor: str, room: float = 0.0) -> str:
    """Draw a text in a row; one that has not the room is cut, and whole in its tooltip."""
    most = int((room - 8) / _CHAR) if room else len(text)
    shown = text if len(text) <= most else text[:most - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    whole = "" if shown == text else f"<title>{escape(text)}</title>"
    return (f'<text x="{x:.1f}" y="{top + 13}" text-anchor="{anchor}" fill="currentColor">'
            f"{escape(shown)}{whole}</text>")


def _fill(kind: int) -> str:
    colour, opacity, dashes = _FILLS[kind % len(_FILLS)]
    return (f'style="fill:{colour};fill-opacity:{opacity}" {_LINE}'
            + (f' stroke-dasharray="{dashes}"' if dashes else ""))


def _mark(which: int, x: float, y: float, says: str = "") -> str:
    shape = (f'<circle cx="{x:.1f}" cy="{y}" r="4"' if which == 0 else
             f'<path d="M{x:.1f} {y - 5}l5 5l-5 5l-5 -5z"')
    return f"{shape} {_fill(which)}>{f'<title>{escape(says)}</title>' if says else ''}" + (
        "</circle>" if which == 0 else "</path>")


def _legend(names: Sequence[str], icon: Callable[[int], str]) -> str:
    return "".join(f' <span style="white-space:nowrap">{icon(which)} {escape(name)}</span>'
                   for which, name in enumerate(names)) if len(names) > 1 else ""


def _icon(drawn: str) -> str:
    return f'<svg aria-hidden="true" width="12" height="12" viewBox="0 0 12 12">{drawn}</svg>'


def _swatch(kind: int) -> str:
    return _icon(f'<rect x="1" y="1" width="10" height="10" {_fill(kind)}/>')
