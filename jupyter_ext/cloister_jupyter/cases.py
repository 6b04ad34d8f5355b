"""Prompt templates, and the tables of cases that fill them.

A template is a text with `{variables}`; `{{` and `}}` stand for braces. A table has a variable a
column, and two columns of their own: `expected`, the answer that is wanted, and `check`, how an
answer is judged (see `cloister_jupyter.checks`). A table is CSV (commas, semicolons or tabs, as a
spreadsheet writes or copies it) or JSON lines. What is wrong is refused by its line, and neither
repr nor error shows a cell.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cloister.errors import DataError, InvalidText, SettingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["CHECK", "EXPECTED", "MOST_CASES", "TABLE_BYTES", "Case", "Table", "Template", "blocks",
           "decode_table", "load_table", "once", "read_table", "seeds"]

EXPECTED, CHECK = "expected", "check"
MOST_CASES = 20_000
TABLE_BYTES = 16 << 20
_NAME = re.compile(r"[^\W\d][\w .-]{0,63}")
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}\r\n]*)\}|[{}]")
_BLOCKS = re.compile(r"^---+[ \t]*(?:\r?\n|$)", re.MULTILINE)
_MOST_SEEDS = 1000
_DELIMITERS = ",;\t"
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # as Excel saves "Unicode text"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of a table. Its repr shows the line alone."""

    line: int  # where it begins, from 1
    values: Mapping[str, str] = field(repr=False)  # by variable
    expected: str | None = field(default=None, repr=False)
    check: str | None = field(default=None, repr=False)  # as it stands in the table


class Template:
    """A text with `{variables}`.

    Rendering puts every value in as it is: braces in a value are no variables.

    Raises:
        SettingError: a brace begins or ends no variable; its line is named.
        InvalidText: the text is not Unicode.
    """

    def __init__(self, text: str) -> None:
        self._parts: list[tuple[str, str | None]] = []  # plain text, then the variable after it
        plain, end = "", 0
        for found in _PIECE.finditer(text):
            plain, end = plain + text[end:found.start()], found.end()
            if found[0] in ("{{", "}}"):
                plain += found[0][0]
                continue
            name = (found[1] or "").strip()
            if not _NAME.fullmatch(name):
                line = text.count("\n", 0, found.start()) + 1
                raise SettingError(
                    f"A brace in line {line} of the template belongs to no variable; double it, "
                    "{{ or }}, to mean the brace itself, or name a variable in it.")
            self._parts.append((plain, name))
            plain = ""
        self._parts.append((plain + text[end:], None))
        _check_unicode(text, "The template")

    def __repr__(self) -> str:
        return f"Template({len(self.variables)} variables)"

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of the variables, in order, each once."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def render(self, case: Case) -> str:
        """Return the text with the values of a case.

        Raises:
            DataError: the case has no value for a variable, which is named.
        """
        for name in self.variables:
            if name not in case.values:
                raise DataError(
                    f"The case of line {case.line} has no value for the variable {name}; add a "
                    "column of that name to the table, or take the variable out of the template.")
        return "".join(
            plain + (case.values[name] if name is not None else "") for plain, name in self._parts)


def blocks(text: str) -> tuple[Template, ...]:
    """Return the templates of a text, which lines of three dashes or more stand between.

    Raises:
        SettingError, InvalidText: see `Template`.
    """
    found = [each.removesuffix("\n").removesuffix("\r") for each in _BLOCKS.split(text)]
    return tuple(Template(each) for each in found if each.strip())


def seeds(text: str) -> tuple[int | None, ...]:
    """Return the seeds of a text such as "1-4 9"; one that is drawn where there is none.

    Raises:
        SettingError: it is no list of whole numbers, or too long.
    """
    found: list[int | None] = []
    for part in re.split(r"[\s,;]+", text.strip()) if text.strip() else ():
        ends = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        if ends is None:
            raise SettingError("Seeds are whole numbers, such as 1-4 or 7, 9; correct them.")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first or last - first + len(found) >= _MOST_SEEDS:
            raise SettingError(f"Seeds are 1 to {_MOST_SEEDS:,}, counted up; take others.")
        found += range(first, last + 1)
    return tuple(found) or (None,)


class Table:
    """Cases that are edited cell by cell; its last columns are `expected` and `check`.

    Its repr shows its size alone. It stays as it was where an edit is refused.
    """

    def __init__(self, cases: Sequence[Case] = (), variables: Sequence[str] = ()) -> None:
        """Take cases; or for variables alone, an empty one."""
        names = dict.fromkeys(name for case in cases for name in case.values)
        self.columns = (*dict.fromkeys((*variables, *names)), EXPECTED, CHECK)
        self.cases = list(cases)
        if variables and not cases:
            self.insert(0)

    def __repr__(self) -> str:
        return f"Table({len(self.cases)} cases)"

    def cell(self, row: int, column: int) -> str:
        """Return what stands in a cell; empty where it has no value."""
        case, name = self.cases[row], self.columns[column]
        if column < len(self.columns) - 2:
            return case.values.get(name, "")
        return (case.expected if name == EXPECTED else case.check) or ""

    def edit(self, row: int, column: int, text: str) -> None:
        """Put a text into a cell.

        Raises:
            InvalidText: it is not Unicode.
            DataError: the table would be too large.
        """
        _check_unicode(text, "The cell")
        if (size := len(text.encode())) > TABLE_BYTES:
            raise _too_large(size)
        case, name = self.cases[row], self.columns[column]
        if column < len(self.columns) - 2:
            self.cases[row] = replace(case, values={**case.values, name: text})
        elif name == EXPECTED:
            self.cases[row] = replace(case, expected=text if text.strip() else None)
        else:
            self.cases[row] = replace(case, check=text if text.strip() else None)

    def insert(self, row: int) -> None:
        """Put an empty case before a row.

        Raises:
            DataError: there are MOST_CASES.
        """
        if len(self.cases) >= MOST_CASES:
            raise DataError(f"A table has at most {MOST_CASES:,} cases; take one out first.")
        line = max((case.line for case in self.cases), default=1) + 1
        self.cases.insert(row, Case(line=line, values=dict.fromkeys(self.columns[:-2], "")))

    def remove(self, row: int) -> None:
        """Take a case out."""
        del self.cases[row]

    def to_json(self) -> str:
        """Return the JSON lines that are read as these cases."""
        return "".join(json.dumps({
            **case.values, EXPECTED: case.expected, CHECK: case.check,
        }, ensure_ascii=False) + "\n" for case in self.cases)


def load_table(path: Path) -> tuple[Case, ...]:
    """Read the table in a file; see `read_table`.

    Raises:
        DataError: see `read_table`; or the file cannot be read, or is neither UTF-8 nor UTF-16.
    """
    try:
        if path.stat().st_size > TABLE_BYTES:
            raise _too_large(path.stat().st_size)
        return decode_table(path.read_bytes(), path.name)
    except OSError as error:
        raise DataError(
            f"Table {path.name} cannot be read ({error.strerror}); check the path.") from None


def decode_table(raw: bytes, name: str = "in the file") -> tuple[Case, ...]:
    """Read the table in the bytes of a file; see `load_table`."""
    try:
        return read_table(raw.decode(_MARKS.get(raw[:2], "utf-8")))
    except UnicodeDecodeError:
        raise DataError(f"Table {name} is not UTF-8; save it as CSV UTF-8.") from None


def read_table(text: str) -> tuple[Case, ...]:
    """Read a table that was pasted, or stood in a file.

    Raises:
        DataError: there is no case, or too many or too large ones; a heading is empty or there
            twice; a row has more or fewer fields than the heading; a quote or JSON is malformed.
            The line is named.
        InvalidText: it holds what is not Unicode.
    """
    text = text.removeprefix("\ufeff")
    _check_unicode(text, "The table")
    if (size := len(text.encode())) > TABLE_BYTES:
        raise _too_large(size)
    lines = text.lstrip()[:1] == "{"
    cases: list[Case] = []
    for case in _json_cases(text) if lines else _csv_cases(text):
        if len(cases) == MOST_CASES:
            raise DataError(
                f"The table has more than {MOST_CASES:,} cases; split it into several tables.")
        cases.append(case)
    if not cases:
        raise DataError(
            "The table has no case; give a line of headings and a line a case, or JSON lines.")
    return tuple(cases)


def _csv_cases(text: str) -> Iterator[Case]:
    rows = _rows(text)
    first = next(rows, None)
    if first is None:
        return
    line, heading = first[0], [name.strip() for name in first[1]]
    _check_heading(heading, line)
    for line, row in rows:
        if len(row) != len(heading):
            raise DataError(
                f"Line {line} of the table has {len(row)} fields and the heading {len(heading)}; "
                "correct it, or put a field with the delimiter in it in double quotes.")
        yield _case(line, dict(zip(heading, row, strict=True)))


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield every row that is not blank, with the line where it begins."""
    delimiter, skipped = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begin = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            why = "has a field that is too large" if "larger" in str(error) else (
                "has a quote where none may be")
            raise DataError(
                f"A row of the table that begins in line {begin} {why}; put a field with quotes "
                "in double quotes, and double those in it.") from None
        if row is None:
            return
        if any(map(str.strip, row)) and begin > skipped:
            yield begin, row
        begin = reader.line_num + 1


def _delimiter(text: str) -> tuple[str, int]:
    """Return what stands between fields, and how many lines come before the heading."""
    lines = text.splitlines()
    if lines and (said := re.fullmatch(r"sep=([,;\t])", lines[0])):  # for Excel
        return said[1], 1
    heading = re.sub(r'"(?:[^"]|"")*"', "", next(filter(str.strip, lines), ""))
    counts = Counter({each: heading.count(each) for each in _DELIMITERS})
    return counts.most_common(1)[0][0], 0


def _check_heading(heading: list[str], line: int) -> None:
    for column, name in enumerate(heading, start=1):
        if not _NAME.fullmatch(name):
            raise DataError(
                f"The heading of column {column} in line {line} is no name of a variable; use "
                "letters, digits, spaces, '.', '-' and '_', and a letter first.")
        if name in heading[:column - 1]:
            raise DataError(
                f"Column {column} in line {line} has the heading of an earlier one; rename it.")


def _json_cases(text: str) -> Iterator[Case]:
    # Not splitlines: JSON may hold U+2028 and its like unescaped.
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            record = json.loads(row, object_pairs_hook=once)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise DataError(
                f"Line {line} of the table is no JSON object; give one object a line.")
        _check_heading(list(record), line)
        values = {name: _text(value) for name, value in record.items() if value is not None}
        for value in values.values():  # JSON can spell half a surrogate pair
            _check_unicode(value, f"Line {line} of the table")
        yield _case(line, values)


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of JSON; raise ValueError where a key is there twice: which one counts?"""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _case(line: int, values: dict[str, str]) -> Case:
    """Take what is no variable out of a row; an empty cell there is none."""
    own = {name.casefold(): name for name in values}
    expected, check = (
        values.pop(own[name]) if name in own else "" for name in (EXPECTED, CHECK))
    return Case(line=line, values=values, expected=expected if expected.strip() else None,
                check=check if check.strip() else None)


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidText(f"{what} holds half a character; paste it anew.") from None


def _too_large(size: int) -> DataError:
    return DataError(
        f"The table has {size:,} bytes and at most {TABLE_BYTES:,} are read; split it.")
