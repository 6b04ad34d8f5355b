"""What the programs that build the family print while they work."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cloister.progress import Progress

__all__ = ["lines"]


def lines(screen: Console, every_s: float = 30.0) -> Progress:
    """Return a progress that prints a line now and then."""
    printed: dict[str, float] = {}

    def show(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if done == total or time.monotonic() - printed.get(stage, -every_s) >= every_s:
            printed[stage] = time.monotonic()
            screen.print(f"{stage}: {done:,} of {total:,} {note}", highlight=False)

    return show
