"""Objects that show themselves as a short table, in a notebook or at a prompt.

A table has figures and names that files and code gave, never what a user or a model said.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Summary", "html_table"]


class Summary(ABC):
    """Base of what shows `summary` where IPython shows it; `repr` stays its own."""

    @abstractmethod
    def summary(self) -> Iterable[tuple[str, str]]:
        """Return names and values, in order."""

    def _repr_mimebundle_(self, **_chosen: object) -> dict[str, str]:
        rows, title = list(self.summary()), type(self).__name__
        width = max((len(name) for name, _ in rows), default=0)
        lines = (f"  {name:{width}}  {value}" for name, value in rows)
        return {"text/plain": "\n".join([title, *lines]), "text/html": html_table(title, rows)}


def html_table(caption: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Return a table whose rows begin with their names, every text escaped."""
    def cells(row: Sequence[str]) -> str:
        name, *values = (escape(cell) for cell in row)
        return f'<th scope="row" style="text-align:left">{name}</th>' + "".join(
            f'<td style="text-align:left">{value}</td>' for value in values)

    body = "\n".join(f"<tr>{cells(row)}</tr>" for row in rows)
    columns = "".join(
        f'<th scope="col" style="text-align:left">{escape(cell)}</th>' for cell in head)
    above = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f"<table><caption>{escape(caption)}</caption>{above}<tbody>{body}</tbody></table>"
