"""How long work says where it is, and what a stage reports in the end: protocols, and nothing else.

`cloister.display` shows it to people; a library's user passes a callable of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Progress", "Report", "silent"]


class Progress(Protocol):
    """Called by long work, in the thread that does it."""

    def __call__(self, stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        """Say that `done` of `total` parts of `stage` are done; a `total` of 0 is not known.

        `stage` is a word or two that stays the same while it lasts, `note` a figure to show beside
        it, such as a loss. Neither holds text that a user typed.
        """
        ...


def silent(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
    """A `Progress` that shows nothing."""


class Report(Protocol):
    """What a stage measured of what it made; see `report` of a checkpoint or bundle."""

    def to_dict(self) -> Mapping[str, object]:
        """JSON-ready."""
        ...
