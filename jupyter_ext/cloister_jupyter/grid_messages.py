"""What the page of the grid sends, and how a grid is kept. No repr shows a text."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cloister_jupyter.grid_run import Form  # noqa: TC001  # msgspec reads the annotations
from cloister_jupyter.sent import Sent

__all__ = ["Blank", "Cases", "Cell", "Compare", "Edit", "File", "Forget", "Insert", "KeptForm",
           "Message", "Open", "Promote", "Read", "Remove", "Rows", "Run", "Stop", "Take"]

MOST_ROWS = 500  # in a message
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Few = Annotated[int, msgspec.Meta(ge=0, le=MOST_ROWS)]


class _Message(Sent, frozen=True, tag=lambda name: f"grid.{name.lower()}"):
    """What the page sends."""


class Read(_Message, frozen=True):
    """A table that was pasted."""

    text: str


class File(_Message, frozen=True):
    """The bytes of a file."""

    base64: str


class Blank(_Message, frozen=True):
    """A table with the variables of the templates and an empty case."""

    templates: str


class Cases(_Message, frozen=True):
    """Tell of rows of the table."""

    view: int
    begin: _Count
    count: _Few


class Cell(_Message, frozen=True):
    """Tell what stands in a cell."""

    row: _Count
    column: _Count


class Edit(_Message, frozen=True):
    """Put a text into a cell."""

    row: _Count
    column: _Count
    text: str


class Insert(_Message, frozen=True):
    """Put an empty case before a row."""

    row: _Count


class Remove(_Message, frozen=True):
    """Take a case out."""

    row: _Count


class Run(_Message, frozen=True):
    """Ask."""

    run: str
    columns: tuple[str, ...]
    name: str
    form: Form


class Stop(_Message, frozen=True):
    """Stop asking."""

    run: str | None = None


class Take(_Message, frozen=True):
    """Take up how the grid of a name was asked."""

    name: str


class Forget(_Message, frozen=True):
    """Forget what is kept under a name."""

    name: str


class Rows(_Message, frozen=True):
    """Tell of rows of the result."""

    view: int
    begin: _Count
    count: _Few
    differing: bool = False
    failing: bool = False


class Open(_Message, frozen=True, tag="grid.row"):
    """Tell of a row in full."""

    prompt: _Count
    case: _Count


class Compare(_Message, frozen=True):
    """Compare two tiers."""

    before: str
    after: str


class Promote(_Message, frozen=True):
    """Put a case into the regression file, with what is expected, or with a tier's answer."""

    prompt: _Count
    case: _Count
    tier: str | None
    said: _Count
    path: str


Message = (Read | File | Blank | Cases | Cell | Edit | Insert | Remove | Run | Stop | Take
           | Forget | Rows | Open | Compare | Promote)


class KeptForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a grid was asked, as it stands in the vault."""

    form: Form
    columns: tuple[str, ...]
    table: str

    def __repr__(self) -> str:
        return "KeptForm()"
