"""Results in a file: CSV, Parquet, or one HTML file that loads nothing and runs nothing.

With a redaction the file is searched before it gets its name: where a value that was to be replaced
is in it, in any usual encoding, there is no file.

A cell of a CSV that a spreadsheet would take for a formula begins with a ' (OWASP, "CSV
Injection"); so does one that begins with such signs after one or more ', so that one ' less is
what it was.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from cloister.audit.canary import Canary, search
from cloister.errors import (
    DataError,
    InvalidText,
    OutputExists,
    OutputUnwritable,
    RedactionFailed,
    SettingError,
)
from cloister.files import disk_errors, sync, whole_file
from cloister_jupyter import page
from cloister_jupyter.proposals import propose

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cloister_jupyter.redaction import Redaction

__all__ = ["FORMATS", "MOST_ROWS", "Row", "Written", "export", "plain_rows", "texts_of",
           "unguarded"]

FORMATS = (".csv", ".parquet", ".html")
MOST_ROWS = 100_000
_CANARY_BYTES = 8  # shorter patterns stand in files by chance
_OURS = ("when", "tier", "finish", "run")  # columns whose texts are no user's
_NESTED = 3  # escapes within escapes that are looked through: JSON in JSON in a URL
_ESCAPE = re.compile(r"(?:\\(?:u[0-9a-f]{4}|x[0-9a-f]{2}))+|\\.", re.IGNORECASE)
_TAG = re.compile("<[^<>\n]{1,200}>")
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")

Cell = str | int | float | bool | None
Row = dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file that was written, and what was replaced in it."""

    path: Path
    rows: int
    size_bytes: int
    replaced: Mapping[str, int]  # places, by label
    searched: int | None  # values that it was searched for and holds none of; None: not redacted


def export(
    rows: Sequence[Mapping[str, object]], path: str | Path, *, redact: bool | Redaction = True,
    title: str = "Results", replace: bool = False, bom: bool = False,
) -> Written:
    """Write rows to a file, by its ending CSV, Parquet or HTML, with personal data replaced.

    `redact` True replaces all that is proposed (see `proposals.propose`); a `Redaction` is one that
    somebody looked through; False writes every text as it is. `bom` begins a CSV with the mark by
    which spreadsheets tell UTF-8. Only its owner may read the file.

    Raises:
        DataError: there is no row, or too many.
        SettingError: the ending stands for no format, or pyarrow is not installed.
        OutputExists: a file is there and `replace` is false.
        OutputUnwritable, NotEnoughDisk: it cannot be written; what was there still is.
        RedactionFailed: a value that was to be replaced is in the file all the same; there is none.
        InvalidText: a text is not Unicode.
    """
    path = Path(path)
    _check(path, replace=replace)
    plain = plain_rows(rows)
    redaction = propose(texts_of(plain)) if redact is True else redact or None
    replaced: Counter[str] = Counter()
    if redaction is not None:
        title, names = redaction.redact(title), _headings(plain[0], redaction)
        plain = [_redacted(row, names, redaction, replaced) for row in plain]
    content = _written(plain, path.suffix, title, bom=bom)
    with disk_errors(path.name), tempfile.TemporaryDirectory(
            prefix=f".{path.stem}.", dir=path.parent) as work:
        part = Path(work) / path.name
        with whole_file(part, private=True) as file:
            file.write(content)
        if redaction is not None:
            frame = _written([dict.fromkeys(plain[0])], path.suffix, "", bom=bom)
            _check_gone(part, frame, redaction)
        _name(part, path, replace=replace)
    return Written(
        path=path, rows=len(plain), size_bytes=len(content), replaced=dict(replaced),
        searched=None if redaction is None else len(redaction.on))


def texts_of(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """Return the texts in rows that may be a user's, each once."""
    return list(dict.fromkeys(
        value for row in rows for name, value in row.items()
        if isinstance(value, str) and name not in _OURS and value.strip()))


def unguarded(cell: str) -> str:
    """Return what a cell of a CSV was before it was guarded."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell[1:]) else cell


def _check(path: Path, *, replace: bool) -> None:
    if path.suffix not in FORMATS:
        raise SettingError(
            f"The file's ending says its format; end it with one of {', '.join(FORMATS)}.")
    if "\0" in str(path):
        raise OutputUnwritable("No file's name can hold a zero byte; name another.")
    if not path.parent.is_dir():
        raise OutputUnwritable(
            f"Directory {path.parent.name} does not exist; create it or name another output.")
    if os.path.lexists(path) and (not replace or not path.is_file() or path.is_symlink()):
        raise _taken(path)


def plain_rows(rows: Sequence[Mapping[str, object]]) -> list[Row]:
    """Return rows with the same columns each, of plain values; others become their JSON.

    Raises:
        DataError: there is no row, or too many.
        InvalidText: a text is not Unicode.
    """
    if not rows:
        raise DataError("There are no results to write; run something first.")
    if len(rows) > MOST_ROWS:
        raise DataError(
            f"There are {len(rows):,} rows and at most {MOST_ROWS:,} are written; choose fewer.")
    columns = dict.fromkeys(str(name) for row in rows for name in row)
    plain: list[Row] = [{name: _cell(row.get(name)) for name in columns} for row in rows]
    try:
        "".join([*columns, *(cell for row in plain for cell in row.values()
                             if isinstance(cell, str))]).encode()
    except UnicodeEncodeError:
        raise InvalidText("A result holds half a character; leave it out.") from None
    return plain


def _cell(value: object) -> Cell:
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _headings(row: Row, redaction: Redaction) -> dict[str, str]:
    """Return what each column is called when values in its name are replaced."""
    names: dict[str, str] = {}
    for name in row:
        new, number = redaction.redact(name), 2
        while new in names.values():
            new, number = f"{redaction.redact(name)} {number}", number + 1
        names[name] = new
    return names


def _redacted(
    row: Row, names: Mapping[str, str], redaction: Redaction, replaced: Counter[str]
) -> Row:
    """Replace in a row; a number is left one unless a value stands in it."""
    changed: Row = {}
    for old, cell in row.items():
        name = names[old]
        if cell is None or isinstance(cell, bool):
            changed[name] = cell
            continue
        text = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
        found = redaction.find(text)
        replaced.update(redaction.values[each.value].label for each in found)
        changed[name] = redaction.redact(text) if found else cell
    return changed


def _written(rows: list[Row], suffix: str, title: str, *, bom: bool) -> bytes:
    if suffix == ".csv":
        return _csv(rows).encode("utf-8-sig" if bom else "utf-8")
    return _parquet(rows) if suffix == ".parquet" else page.document(title, rows).encode()


def _csv(rows: list[Row]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
    heading: Row = {name: name for name in rows[0]}
    for row in (heading, *rows):
        writer.writerow("" if cell is None else _guarded(cell) for cell in row.values())
    return file.getvalue()


def _guarded(cell: Cell) -> Cell:
    return "'" + cell if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _parquet(rows: list[Row]) -> bytes:
    """Write without compression: whoever wants to can search the file for a text."""
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError:
        raise SettingError(
            "Parquet needs pyarrow; install it with `pip install 'cloister[jupyter]'`, or write "
            "CSV.") from None
    columns = {}
    for name in rows[0]:
        cells = [row[name] for row in rows]
        kinds = {type(cell) for cell in cells} - {type(None)}
        if len(kinds) > 1 and not kinds <= {int, float}:
            cells = [None if cell is None else str(cell) for cell in cells]
        try:
            columns[name] = pa.array(cells, pa.float64() if kinds == {int, float} else None)
        except (pa.ArrowInvalid, OverflowError):  # a whole number of more than 64 bits
            columns[name] = pa.array([None if cell is None else str(cell) for cell in cells])
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, compression="NONE")
    return file.getvalue()


def _check_gone(file: Path, frame: bytes, redaction: Redaction) -> None:
    """Raise unless none of the values is in a file, in any usual spelling or encoding.

    What stands in the `frame`, the same file without rows, is no find.
    """
    left = _left(file, redaction)
    if left:
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / file.name).write_bytes(frame)
            left -= _left(Path(work) / file.name, redaction)
    if left:
        raise RedactionFailed(
            f"{file.name} would still hold {len(left)} of the {len(redaction.on)} values that were "
            "to be replaced, in another spelling or encoding, and was deleted; mark them as they "
            "are spelt there, too, or leave those rows out.")


def _left(file: Path, redaction: Redaction) -> set[int]:
    """Return the values in a file: in what it says, and in its bytes."""
    said = {hit.value for text in _texts_in(file) for reading in _readings(text)
            for hit in redaction.find(reading)}
    canaries = [Canary(str(number), redaction.values[number].text) for number in redaction.on]
    return said | {int(find.way) for find in search(
        file.parent, canaries, least_bytes=_CANARY_BYTES)}


def _readings(text: str) -> Iterator[str]:
    """Yield a text, and what programs read in it: escapes of URLs, HTML, JSON and Markdown."""
    for _ in range(1 + _NESTED):
        yield text
        if "+" in text and "%" in text:
            yield unquote(text.replace("+", " "))
        if _TAG.search(text):
            yield _TAG.sub("", text)
        plain = _ESCAPE.sub(_unescaped, html.unescape(unquote(text)))
        if plain == text:
            return
        text = plain


def _unescaped(escape: re.Match[str]) -> str:
    if len(escape[0]) == 2:
        return " " if escape[0][1] in "nrtbf" else escape[0][1]
    units = b"".join(int(code, 16).to_bytes(2, "little")
                     for code in re.split(r"\\[uUxX]", escape[0])[1:])
    return units.decode("utf-16-le", "replace")


def _texts_in(file: Path) -> Iterable[str]:
    if file.suffix == ".csv":
        yield file.read_text("utf-8-sig").replace('""', '"')
    elif file.suffix == ".html":
        body = file.read_text("utf-8").partition("<body")[2]
        yield from map(html.unescape, re.split("<[^>]*>", body))  # each alone: no two cells are one
    else:
        from pyarrow import parquet

        for row in parquet.read_table(file).to_pylist():
            yield from (str(cell) for cell in row.values() if isinstance(cell, str | int | float))


def _name(part: Path, path: Path, *, replace: bool) -> None:
    """Give a whole file its name."""
    try:
        if replace:
            part.replace(path)
        else:
            path.hardlink_to(part)  # refused where a file came there meanwhile
    except FileExistsError:
        raise _taken(path) from None
    except OSError:  # a file system without links
        if replace or path.exists():
            raise
        part.rename(path)
    sync(path.parent)


def _taken(path: Path) -> OutputExists:
    return OutputExists(
        f"Output {path.name} exists already; name another, or say that it is replaced.")
