"""What the command lines of the programs that build the family share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console

from cloister.errors import CloisterError, SettingError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from cloister.progress import Progress

__all__ = ["add_mean", "data", "lines", "mean", "run"]


def lines(screen: Console, every_s: float = 30.0) -> Progress:
    """Return a progress that prints a line now and then."""
    printed: dict[str, float] = {}

    def show(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if done == total or time.monotonic() - printed.get(stage, -every_s) >= every_s:
            printed[stage] = time.monotonic()
            screen.print(f"{stage}: {done:,} of {total:,} {note}", highlight=False)

    return show


def data(given: argparse.Namespace) -> Path:
    """Return the folder of the public data sets.

    Raises:
        SettingError: none is named.
    """
    if given.data is None:
        raise SettingError("No data folder is named; pass --data or set CLOISTER_DATA.")
    folder: Path = given.data
    return folder


def add_mean(parser: argparse.ArgumentParser) -> None:
    """Add the argument that `mean` reads, beside `--begin`."""
    parser.add_argument("--mean", action="store_true",
                        help="with --begin: keep the mean of the weights begun from and reached")


def mean(given: argparse.Namespace) -> bool:
    """Return whether the mean of the weights begun from and reached is kept.

    Raises:
        SettingError: nothing is begun from.
    """
    if given.mean and given.begin is None:
        raise SettingError("--mean is taken with what an earlier run made; add --begin.")
    return bool(given.mean)


def run(work: Callable[[argparse.Namespace, Console], None], given: argparse.Namespace) -> int:
    """Do the work; return 0, 1 after the sentence of an error, or 130 where it was stopped."""
    screen = Console(stderr=True)
    try:
        work(given, screen)
    except CloisterError as error:
        screen.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        screen.print("Stopped; the same command goes on from here.")
        return 130
    return 0
