"""A bar for long work, on the standard error."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["bar"]


@contextmanager
def bar(
    title: str, total: int, *, done: int = 0, console: Console | None = None
) -> Iterator[Callable[[int, str], None]]:
    """Call what it gives with how many are done, and a note."""
    with Progress(
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console or Console(stderr=True),
    ) as progress:
        task = progress.add_task("", total=total, completed=done, note="")
        yield lambda now, note: progress.update(task, completed=now, note=note)
