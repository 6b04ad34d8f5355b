"""Readers of data sets: each gives the same records, whatever the file looked like.

SNIPS is read in its original format (one JSON file an intent; Coucke et al., arXiv 1805.10190),
and anything else as JSON lines of `{"task", "input", "target"}`. No torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Example", "read", "split", "tool_call"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One request and the answer wanted. Its repr shows neither."""

    task: str  # the system prompt
    input: str
    target: str

    def __repr__(self) -> str:
        return f"Example(task={self.task!r})"


def tool_call(name: str, arguments: Iterable[tuple[str, str]]) -> str:
    """The JSON of a tool call, in the reference family's format.

    Arguments keep their order; one that occurs twice becomes a list; values lose outer spaces.
    """
    merged: dict[str, str | list[str]] = {}
    for key, raw in arguments:
        value, held = raw.strip(), merged.get(key)
        if held is None:
            merged[key] = value
        elif isinstance(held, list):
            held.append(value)
        else:
            merged[key] = [held, value]
    return json.dumps({"name": name, "arguments": merged}, ensure_ascii=False)


def read(path: str | Path) -> list[Example]:
    """Every example in `path`, a file or a directory of files, in order of file names.

    Raises:
        DataError: nothing to read, or a malformed record, named by file and number.
    """
    path = Path(path)
    files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    examples = [example for file in files for example in _read_file(file)]
    if not examples:
        raise DataError(f"{path.name} holds no examples; name a data file or a directory of them.")
    return examples


def split(
    examples: Iterable[Example], *, held_out: float = 0.05
) -> tuple[list[Example], list[Example]]:
    """Training and development parts; equal inputs, case and spaces aside, never straddle them."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        normal = " ".join(example.input.lower().split())
        number = int.from_bytes(hashlib.sha256(normal.encode()).digest()[:4], "big")
        parts[number < held_out * 2**32].append(example)
    return parts


def _read_file(path: Path) -> list[Example]:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise DataError(
            f"Data file {path.name} cannot be read ({error.strerror}); check the path."
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"Data file {path.name} is not UTF-8; convert it.") from None
    if path.suffix == ".jsonl":
        return [
            _record(line, path, number)
            # Not splitlines: JSON may hold U+2028 and its like unescaped.
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    try:
        return _snips(json.loads(text), path)
    except (ValueError, RecursionError):
        raise DataError(f"Data file {path.name} is not valid JSON; check it.") from None


def _example(*values: object) -> Example:
    """Three strings of real text, else TypeError or ValueError."""
    if not all(isinstance(value, str) for value in values):
        raise TypeError
    task, text, target = map(str, values)
    (task + text + target).encode()  # JSON can spell half a surrogate pair
    return Example(task=task, input=text, target=target)


def _record(line: str, path: Path, number: int) -> Example:
    try:
        record = json.loads(line)
        return _example(record["task"], record["input"], record["target"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f'Line {number} of {path.name} is not {{"task", "input", "target"}} with three '
            "strings; correct it."
        ) from None


def _snips(data: object, path: Path) -> list[Example]:
    examples, number = [], 0
    try:
        ((intent, rows),) = data.items()  # type: ignore[attr-defined]
        for number, row in enumerate(rows, start=1):  # noqa: B007  # named in the error
            pieces = row["data"]
            slots = [(piece["entity"], piece["text"]) for piece in pieces if "entity" in piece]
            if not all(isinstance(slot, str) for slot, _ in slots):
                raise TypeError
            text = "".join(piece["text"] for piece in pieces).strip()
            examples.append(_example("call", text, tool_call(intent, slots)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            f"Record {number} of {path.name} is not in the SNIPS format; correct it."
        ) from None
    return examples
