"""The readers of data sets, which give the same records for every format.

| format | task | file |
|---|---|---|
| SNIPS (Coucke et al., arXiv 1805.10190) | `call` | one JSON file an intent |
| CLINC150 (Larson et al., EMNLP 2019) | `intent` | one JSON file: lists of [request, intent] |
| FairytaleQA (Xu et al., ACL 2022) | `story` | JSON lines with `sections` |
| plain | any | JSON lines of `{"task", "input", "target"}` |

No torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.errors import DataError, OverlapError
from cloister.message import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    _Parts = Callable[[Collection[str]], Collection[str]]  # which lists of a CLINC150 file

__all__ = ["Corpus", "Example", "Flaw", "load", "normalized", "overlap", "read",
           "refuse_overlap", "split", "tool_call"]

NONE = "none"  # name of the call that answers a request outside every intent
TOLERATED = 0.05  # share of the records of a training set


@dataclass(frozen=True, kw_only=True)
class Example:
    """What was said, and the answer wanted. Its repr shows neither."""

    task: str  # what scores are counted by; the system prompt, where there are no turns
    input: str  # the last message before the answer
    target: str
    turns: tuple[Message, ...] = ()  # of a conversation: all before the answer
    place: str = field(default="", compare=False)  # file and number, where it was read

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation before the answer; a task, unless it is empty, is its system message."""
        if self.turns:
            return self.turns
        request = Message(role="user", content=self.input)
        return (Message(role="system", content=self.task), request) if self.task else (request,)

    def __repr__(self) -> str:
        return f"Example(task={self.task!r})"


@dataclass(frozen=True, kw_only=True)
class Flaw:
    """A record that was left out, and where it stands."""

    file: str
    number: int  # of the line or record, from 1
    kind: str  # "malformed", "empty", "blank" (a line) or "duplicate"

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.kind}"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The usable examples of a data set, and the flaws of the rest."""

    examples: tuple[Example, ...]
    flaws: tuple[Flaw, ...]

    def count(self) -> dict[str, int]:
        """Return the number of flaws of each kind."""
        return dict(Counter(flaw.kind for flaw in self.flaws))


def tool_call(name: str, arguments: Iterable[tuple[str, str]] = ()) -> str:
    """Return the JSON of a tool call, in the reference family's format.

    Arguments keep their order; one that occurs twice becomes a list; values lose outer spaces.
    """
    merged: dict[str, str | list[str]] = {}
    for key, raw in arguments:
        value, earlier = raw.strip(), merged.get(key)
        if earlier is None:
            merged[key] = value
        elif isinstance(earlier, list):
            earlier.append(value)
        else:
            merged[key] = [earlier, value]
    return json.dumps({"name": name, "arguments": merged}, ensure_ascii=False)


def read(path: str | Path, *, parts: Collection[str] | None = None) -> list[Example]:
    """Read every example to measure on in `path`, a file or a directory, by order of file names.

    Of a CLINC150 file only the lists named in `parts`; without, its test lists, where it has none
    its validation lists, else all. Nothing is left out, repeated records included: scores count
    what the data set counts.

    Raises:
        DataError: nothing to read, or a malformed or empty record, named by file and number.
    """
    examples = []
    chosen = functools.partial(_first, _EVALUATION) if parts is None else lambda _: parts
    for record in _records(Path(path), chosen):
        if isinstance(record, Flaw):
            if record.kind == "blank":
                continue
            raise DataError(
                f"Record {record.number} of {record.file} is {record.kind}: it is not in the "
                'SNIPS, CLINC150 or FairytaleQA format, nor {"task", "input", "target"} with three '
                "strings; correct it."
            )
        examples.append(record[2])
    if not examples:
        raise _nothing(Path(path))
    return examples


def load(path: str | Path, *, tolerated: float = TOLERATED) -> Corpus:
    """Read the examples to train on in `path`, but malformed, empty, blank and repeated records.

    Of a CLINC150 file only the training lists, where it has any.

    Raises:
        DataError: nothing to read, or more than `tolerated`, a share, had to be left out.
    """
    examples: dict[Example, None] = {}
    flaws = []
    for record in _records(Path(path), functools.partial(_first, _TRAINING)):
        if isinstance(record, Flaw):
            flaws.append(record)
        elif record[2] in examples:
            flaws.append(Flaw(file=record[0], number=record[1], kind="duplicate"))
        else:
            examples[record[2]] = None
    if not examples and not flaws:
        raise _nothing(Path(path))
    corpus = Corpus(examples=tuple(examples), flaws=tuple(flaws))
    if len(flaws) > tolerated * (len(flaws) + len(examples)):
        kinds = ", ".join(f"{count} {kind}" for kind, count in corpus.count().items())
        places = ", ".join(map(str, flaws[:5]))
        raise DataError(
            f"Of {len(flaws) + len(examples)} records {len(flaws)} cannot be used ({kinds}; first "
            f"{places}), more than the {tolerated:.0%} tolerated; correct them or raise the bound."
        )
    return corpus


def split(
    examples: Iterable[Example], *, held_out: float = 0.05
) -> tuple[list[Example], list[Example]]:
    """Return training and development parts; inputs that normalise alike never straddle them."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(normalized(example.input).encode()).digest()
        number = int.from_bytes(digest[:4], "big")
        parts[number < held_out * 2**32].append(example)
    return parts


def normalized(text: str) -> str:
    """Return `text` without case, punctuation and repeated spaces, letters in one spelling.

    What is all punctuation or symbols stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(
        sign if sign == "_" or unicodedata.category(sign)[0] in "LMN" else " " for sign in folded)
    return " ".join((words if words.strip() else folded).split())


def overlap(training: Iterable[Example], evaluation: Iterable[Example]) -> int:
    """Count the evaluation inputs that occur in training inputs of their task, normalised."""
    seen = {(example.task, normalized(example.input)) for example in training}
    return sum((example.task, normalized(example.input)) in seen for example in evaluation)


def refuse_overlap(training: Iterable[Example], evaluation: Collection[Example]) -> None:
    """Raise OverlapError if evaluation inputs occur in the training data."""
    shared = overlap(training, evaluation)
    if shared:
        raise OverlapError(
            f"{shared} of {len(evaluation)} evaluation requests occur in the training data; "
            "remove them there, or pass --allow-overlap and do not report the scores."
        )


def _nothing(path: Path) -> DataError:
    return DataError(f"{path.name} holds no examples; name a data file or a directory of them.")


_Record = tuple[str, int, Example] | Flaw
"""File, number and example; or a flaw."""

_TRAINING = (("train", "oos_train"),)  # of the first that a CLINC150 file has any of
_EVALUATION = (("test", "oos_test"), ("val", "oos_val"))


def _first(sets: Iterable[Collection[str]], names: Collection[str]) -> Collection[str]:
    """Return the first of `sets` with any of `names`; without one, all names."""
    return next((some for some in sets if set(some) & set(names)), names)


def _records(path: Path, parts: _Parts) -> Iterator[_Record]:
    for file in sorted(path.glob("*.json*")) if path.is_dir() else [path]:
        yield from _read_file(file, parts)


def _read_file(path: Path, parts: _Parts) -> Iterator[_Record]:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise DataError(
            f"Data file {path.name} cannot be read ({error.strerror}); check the path."
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"Data file {path.name} is not UTF-8; convert it.") from None
    if path.suffix == ".jsonl":
        # Not splitlines: JSON may hold U+2028 and its like unescaped.
        lines = text.split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield from _checked(path, number, functools.partial(_line, line))
            elif number < len(lines):
                yield Flaw(file=path.name, number=number, kind="blank")
        return
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"Data file {path.name} is not valid JSON; check it.") from None
    yield from _file(data, path, parts)


def _checked(path: Path, number: int, parse: Callable[[], list[Example]]) -> Iterator[_Record]:
    """Yield the examples that `parse` returns, or the flaw that it raises for."""
    try:
        examples = parse()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        yield Flaw(file=path.name, number=number, kind="malformed")
        return
    for example in examples:
        if example.input.strip() and example.target.strip():
            yield path.name, number, replace(example, place=f"{path.name}:{number}")
        else:
            yield Flaw(file=path.name, number=number, kind="empty")


def _example(task: object, text: object, target: object) -> Example:
    """Return an example; raise TypeError or ValueError unless all are Unicode text."""
    if not (isinstance(task, str) and isinstance(text, str) and isinstance(target, str)):
        raise TypeError
    (task + text + target).encode()  # JSON can spell half a surrogate pair
    return Example(task=task, input=text, target=target)


def _line(line: str) -> list[Example]:
    record = json.loads(line)
    if "question" in record and "sections" in record:
        return []  # FairytaleQA's questions lie beside its tales
    if "sections" in record:
        return _story(record["sections"])
    return [_example(record["task"], record["input"], record["target"])]


def _story(sections: object) -> list[Example]:
    """Return each section's first sentence and what follows it."""
    if not isinstance(sections, list) or not all(isinstance(text, str) for text in sections):
        raise TypeError
    examples = []
    for text in sections:
        opening = re.match(r"\s*(.+?[.!?][\"']*)\s+(?=\S)", text, re.DOTALL)
        if opening:
            examples.append(_example("story", opening[1], text[opening.end():].strip()))
    return examples


def _file(data: object, path: Path, parts: _Parts) -> Iterator[_Record]:
    """Yield the records of a JSON file: SNIPS has one list of objects, CLINC150 lists of pairs."""
    if not isinstance(data, dict) or not all(isinstance(rows, list) for rows in data.values()):
        raise DataError(
            f"Data file {path.name} is neither in the SNIPS nor in the CLINC150 format; "
            "convert it to JSON lines."
        )
    chosen = parts(data.keys())
    records = [(name, row) for name, rows in data.items() for row in rows]
    for number, (name, row) in enumerate(records, start=1):
        if not isinstance(row, list):
            yield from _checked(path, number, functools.partial(_call, name, row))
        elif name in chosen:
            yield from _checked(path, number, functools.partial(_intent, *row))


def _intent(text: object, intent: object) -> list[Example]:
    if not isinstance(intent, str):
        raise TypeError
    return [_example("intent", text, tool_call(NONE if intent == "oos" else intent))]


def _call(intent: str, row: dict[str, list[dict[str, str]]]) -> list[Example]:
    pieces = row["data"]
    slots = [(piece["entity"], piece["text"]) for piece in pieces if "entity" in piece]
    if not all(isinstance(slot, str) for slot, _ in slots):
        raise TypeError
    text = "".join(piece["text"] for piece in pieces).strip()
    return [_example("call", text, tool_call(intent, slots))]
