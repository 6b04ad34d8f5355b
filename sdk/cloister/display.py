"""What people see: tables, progress, and an answer as it comes. Everything goes to standard error
but results. What a model said is shown without control sequences, and never read as markup."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from cloister.runtime.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.progress import Progress

__all__ = ["bytes_text", "clean", "count", "note", "progress", "quiet", "show", "table"]

_LINE_S = 5  # between lines of progress where there is no terminal
# Escape sequences begin with these; 202D and 202E turn a line around (unicode.org/reports/tr36).
_CONTROLS = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), 0x202D, 0x202E], "\N{REPLACEMENT CHARACTER}")


def clean(text: str) -> str:
    """Return a text whose control characters, line breaks and tabs apart, do nothing."""
    return text.translate(_CONTROLS)


def show(text: str, *, end: str = "\n") -> None:
    """Write a part of a result to the standard output, at once."""
    print(clean(text), end=end, flush=True)  # noqa: T201


def note(text: str) -> None:
    """Write a remark to the standard error."""
    Console(stderr=True).print(Text(clean(text)), style="dim")


def bytes_text(size: float) -> str:
    """A size for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError


def count(number: float) -> str:
    """A number for people, in thousands and so on."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1
) -> None:
    """Print a table on the standard output; the first `texts` columns to the left."""
    grid = Table(
        title=Text(clean(title), style="bold"), title_justify="left", show_lines=texts > 1)
    for number, name in enumerate(columns):
        grid.add_column(
            Text(clean(name)), justify="left" if number < texts else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(clean(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(grid)


@contextmanager
def quiet(debug: bool) -> Iterator[Console]:
    """A console on the standard error, which libraries cannot write to meanwhile.

    ExecuTorch's runtime writes there from C++ at every call; with `debug` it may.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    console = Console(file=os.fdopen(os.dup(kept), "w", encoding="utf-8"), width=100,
                      force_terminal=sys.stderr.isatty())
    if not debug:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 2)
        os.close(silent)
    try:
        yield console
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def progress(console: Console, title: str) -> Iterator[Progress]:
    """Show long work: bars at a terminal, else a line when a stage begins and every few seconds."""
    if not console.is_terminal:
        yield _lines(console, title)
        return
    columns = (
        SpinnerColumn(), TextColumn(title), TextColumn("{task.description:<20}"),
        BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), TextColumn("peak {task.fields[peak]}"),
    )
    with Bars(*columns, console=console) as bars:
        task = bars.add_task("", total=None, note="", peak="")

        def update(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
            bars.update(task, description=stage, completed=done, total=total or None, note=note,
                        peak=bytes_text(peak_bytes()))

        yield update


def _lines(console: Console, title: str) -> Progress:
    last, shown = "", 0.0

    def update(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        nonlocal last, shown
        now = time.monotonic()
        if stage == last and now - shown < _LINE_S:
            return
        last, shown = stage, now
        of = f" {done}/{total}" if total else ""
        console.print(Text(" ".join(f"{title}: {stage}{of} {note}".split())))

    return update
