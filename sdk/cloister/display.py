"""What people see: tables, progress, and an answer as it comes. Everything goes to standard error
but results."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cloister.runtime.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cloister import progress

__all__ = ["bytes_text", "count", "counting", "quiet", "stages", "table"]


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
    grid = Table(title=title, title_justify="left", title_style="bold", show_lines=texts > 1)
    for number, name in enumerate(columns):
        grid.add_column(name, justify="left" if number < texts else "right")
    for row in rows:
        grid.add_row(*row)
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
def counting(console: Console, title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for work that is counted: call it with what is done now, how many of it, and of how
    many."""
    columns = (
        SpinnerColumn(), TextColumn(title), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.description:<12}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def count(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield count


@contextmanager
def stages(console: Console, title: str, total: int) -> Iterator[progress.Progress]:
    """A bar over `total` stages, which moves on when another one is reported."""
    columns = (
        SpinnerColumn(), TextColumn(title), BarColumn(bar_width=24),
        TextColumn("{task.description:<24}"), TimeElapsedColumn(),
        TextColumn("peak {task.fields[peak]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, peak=bytes_text(peak_bytes()))
        begun: list[str] = []

        def report(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
            if begun[-1:] != [stage]:
                begun.append(stage)
            text = f"{stage} {done}/{total} {note}" if total else f"{stage} {note}"
            bar.update(
                task, completed=len(begun) - 1, description=text, peak=bytes_text(peak_bytes())
            )

        yield report
        bar.update(task, completed=total, description="done", peak=bytes_text(peak_bytes()))
