"""The formats of data files, each read into examples.

| format | task | what stands in the file |
|---|---|---|
| SNIPS (Coucke et al., arXiv 1805.10190) | `call` | lists of requests by intent |
| CLINC150 (Larson et al., EMNLP 2019) | `intent` | lists of [request, intent] by split |
| FairytaleQA (Xu et al., ACL 2022) | `story` | records with `sections` |
| chat | `chat` | records with `messages`: `role`, `content` |
| ShareGPT | `chat` | records with `conversations`: `from`, `value` |
| Alpaca, Dolly | `chat` | records of `instruction`, `input`, `output`; or `context`, `response` |
| plain | any | records of `task`, `input`, `target`; `image` or `audio` names a file beside them |
| spoken intents | `order` | `intent` and `slots` by the names of recordings |

Records are JSON lines, one list, or lists by name, in UTF-8, compressed by gzip or not. Each answer
of a conversation is an example, unless it is marked as not to be learnt. No torch.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.errors import DataError
from cloister.example import CHAT, MEDIA, NONE, Example, tool_call
from cloister.message import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

__all__ = ["DataFile", "Flaw", "Split", "is_data", "split_of"]

UNPACKED_BYTES = 256 << 20  # of a compressed file, at most
_ENDING = re.compile(r"\.(jsonl|ndjson|json)(\.gz)?\Z", re.IGNORECASE)
_GZIP = b"\x1f\x8b"
# zip, Parquet, Arrow, bzip2, xz, Zstandard, 7z
_BINARY = (b"PK\x03\x04", b"PAR1", b"ARROW1", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"7z\xbc\xaf")


class Split(StrEnum):
    """A part of a data set."""

    TRAIN = "train"
    VALIDATE = "validate"
    TEST = "test"


_WORDS = {
    **dict.fromkeys(("train", "training"), Split.TRAIN),
    **dict.fromkeys(
        ("val", "valid", "validate", "validation", "dev", "devel", "development"), Split.VALIDATE),
    **dict.fromkeys(("test", "tests", "testing", "eval", "evaluation"), Split.TEST),
}
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}
_OF_TOOLS = ("tool", "function", "function_call", "observation")
_LEARN = ("weight", "train", "training", "loss")  # of OpenAI, axolotl and ms-swift; false or 0: not
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True)
class Flaw:
    """A record that cannot be used, and where it stands."""

    file: str
    number: int  # of the line or record, from 1
    kind: str  # "blank" (a line), "duplicate", or one that `corpus` gives the reason of

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.kind}"


class _Unusable(Exception):
    """A well-formed record of the kind that it is raised with."""


def is_data(name: str) -> bool:
    """Return whether a file of this name is one of a data set."""
    return _ENDING.search(name) is not None


def split_of(name: str) -> Split | None:
    """Return the split that the words of a file's or list's name say, if they say one."""
    words = re.findall(r"[a-z]+", name.casefold())
    found = {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 else None


class DataFile:
    """A file of a data set, read when its lists or records are asked for."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        ending = _ENDING.search(path.name)
        self._lines = ending is not None and ending[1].casefold() != "json"

    @cached_property
    def lists(self) -> dict[str, Split | None]:
        """The names of lists that have splits, where there are such lists.

        Raises:
            DataError: the file cannot be read.
        """
        if self._lines:
            return {}
        found = {
            name: split_of(name) for name, row in self._rows
            if name and not (isinstance(row, dict) and "data" in row)}  # SNIPS has intents
        return found if any(found.values()) else {}

    @property
    def splits(self) -> frozenset[Split | None]:
        """The splits of its lists, or the one that its name says, or None."""
        return frozenset(self.lists.values() or [split_of(self.name)])

    def examples(self, lists: Collection[str] | None = None) -> Iterator[Example | Flaw]:
        """Yield the examples and flaws of every record, or of those in `lists`.

        A request that has no answer has an empty target.

        Raises:
            DataError: the file cannot be read.
        """
        for number, (name, row) in enumerate(self._rows, start=1):
            if lists is None or name in lists:
                yield from self._checked(number, partial(_parsed, name, row))

    @cached_property
    def _rows(self) -> list[tuple[str | None, object]]:
        """Each row with the name of its list, if any; lines of JSON unparsed, with None."""
        text = _text(self._path)
        # A list of records is no JSON lines, whatever the file is called.
        if not self._lines or text.lstrip().startswith("["):
            try:
                data = json.loads(text)
            except (ValueError, RecursionError):
                pass
            else:
                return _rows(data)
        # Not splitlines: JSON may hold U+2028 and its like unescaped.
        lines = re.split("\r\n?|\n", text.rstrip()) if text.strip() else []
        if lines and not self._lines and not _is_object(next(filter(str.strip, lines))):
            raise DataError(f"Data file {self.name} is not valid JSON; check it.")
        return [(None, line) for line in lines]

    def _checked(
        self, number: int, parse: Callable[[], list[Example]]
    ) -> Iterator[Example | Flaw]:
        """Yield the examples that `parse` returns, or the flaw that it raises for."""
        kind = "malformed"
        try:
            examples = parse()
        except _Unusable as error:
            kind, examples = str(error), []
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            examples = []
        else:
            kind = ""
        if kind:
            yield Flaw(file=self.name, number=number, kind=kind)
        for example in examples:
            example = replace(example, place=f"{self.name}:{number}")
            if example.files:
                files = tuple((kind, self._beside(path)) for kind, path in example.files)
                found = [(kind, path) for kind, path in files if path is not None]
                if len(found) == len(files):
                    yield replace(example, files=tuple(found))
                else:
                    yield Flaw(file=self.name, number=number, kind="without its file")
            elif all(turn.text.strip() for turn in example.messages[-1:] + example.turns):
                yield example
            else:
                yield Flaw(file=self.name, number=number, kind="empty")

    def _beside(self, name: Path) -> Path | None:
        """Return a file that a record names, unless it lies outside the data's own folder."""
        folder = self._path.parent.resolve()
        try:
            path = (folder / name).resolve()
            return path if path.is_relative_to(folder) and path.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None


def _text(path: Path) -> str:
    """Return what a file says, unpacked, without a byte order mark."""
    name = path.name
    try:
        raw = path.read_bytes()
        if raw.startswith(_GZIP):
            with gzip.open(io.BytesIO(raw)) as file:
                raw = file.read(UNPACKED_BYTES + 1)
            if len(raw) > UNPACKED_BYTES:
                raise DataError(
                    f"Data file {name} unpacks to more than {UNPACKED_BYTES >> 20} MiB; if that is "
                    "right, unpack it with gunzip and name the result.")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(
            f"Data file {name} is no whole gzip file; fetch or pack it again.") from None
    except OSError as error:
        raise DataError(
            f"Data file {name} cannot be read ({error.strerror}); check the path.") from None
    if raw.startswith(_BINARY):
        raise DataError(
            f"Data file {name} is packed or in a binary format; unpack it, or convert it to JSON "
            "lines.")
    encoding = json.detect_encoding(raw)
    if not encoding.startswith("utf-8"):
        raise DataError(
            f"Data file {name} is {encoding[:6].upper()}; save it as UTF-8, for instance with: "
            f"iconv -f {encoding[:6]} -t utf-8 {name}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            f"Data file {name} is not UTF-8; convert it, for instance with: "
            f"iconv -f latin1 -t utf-8 {name}") from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows(data: object) -> list[tuple[str | None, object]]:
    """Return the rows of a JSON file: those of its one list, of lists by name, or itself."""
    if isinstance(data, list):
        return [("", row) for row in data]
    if isinstance(data, dict) and data and all(
        isinstance(label, dict) and label.keys() == {"intent", "slots"} for label in data.values()
    ):
        return [("", {"audio": name, **label}) for name, label in data.items()]
    if isinstance(data, dict) and not {"messages", "conversations"} & data.keys() and all(
        isinstance(rows, list) for rows in data.values()
    ):
        return [(name, row) for name, rows in data.items() for row in rows]
    return [("", data)]


def _parsed(name: str | None, row: object) -> list[Example]:
    if name is None:
        assert isinstance(row, str)
        line = row.removeprefix("\ufeff")  # between files that were put together
        if not line.strip():
            raise _Unusable("blank")
        return _record(json.loads(line))
    if name and isinstance(row, list):
        return _intent(*row)
    if name and isinstance(row, dict) and "data" in row:
        return _call(name, row["data"])
    return _record(row)


def _record(record: object) -> list[Example]:
    if not isinstance(record, dict):
        raise TypeError
    if "sections" in record:  # FairytaleQA's questions lie beside its tales
        return [] if "question" in record else _story(record["sections"])
    if "messages" in record or "conversations" in record:
        return _conversation(record)
    if "instruction" in record:
        return _conversation({**record, "messages": _instruction(record)})
    if any(kind in record for kind in MEDIA):
        return [_with_media(record)]
    return [_example(record["task"], record["input"], record.get("target", ""))]


def _with_media(record: dict[str, object]) -> Example:
    """Return an example whose request is, or begins with, a picture or a recording."""
    if "intent" in record:
        slots = record["slots"]
        if not isinstance(slots, dict):
            raise TypeError
        example = _example("order", "", tool_call(
            _unicode(record["intent"]),
            [(_unicode(slot), _unicode(value)) for slot, value in slots.items()]))
    else:
        example = _example(record["task"], record.get("input", ""), record.get("target", ""))
    files = tuple(
        (kind, Path(_unicode(record[kind]))) for kind in MEDIA if kind in record)
    return replace(example, files=files)


def _example(task: object, text: object, target: object) -> Example:
    return Example(task=_unicode(task), input=_unicode(text), target=_unicode(target))


def _unicode(text: object) -> str:
    """Return a text; raise TypeError or ValueError unless it is one."""
    if not isinstance(text, str):
        raise TypeError
    text.encode()  # JSON can spell half a surrogate pair
    return text


def _conversation(record: dict[str, object]) -> list[Example]:
    """Return an example for each answer to what a user said."""
    if record.get("tools") not in (None, "", "[]", []) or record.get("functions"):
        raise _Unusable("with tools")
    rows = record.get("messages") or record["conversations"]
    if not isinstance(rows, list):
        raise TypeError
    turns: list[Message] = []
    if system := record.get("system") or record.get("system_prompt"):
        rows = [{"role": "system", "content": system}, *rows]
    examples = []
    for row in rows:
        name = (row["role"] if "role" in row else row["from"]).casefold()
        if name in _OF_TOOLS or row.get("tool_calls") or row.get("function_call"):
            raise _Unusable("with tools")
        turn = Message(
            role=_ROLES[name], content=_content(row["content" if "content" in row else "value"]))
        if turn.role == "system":
            if turns == [turn] or not turn.text.strip():
                continue
            if turns:
                raise ValueError
        asked = any(earlier.role == "user" for earlier in turns)
        if turn.role == "assistant" and _is_learnt(row) and asked:
            examples.append(replace(_unanswered(turns), target=turn.text))
        turns.append(turn)
    if not examples:
        if not turns or turns[-1].role != "user":
            raise _Unusable("empty")
        examples = [_unanswered(turns)]
    return examples


def _is_learnt(row: dict[str, object]) -> bool:
    """Return whether an answer is to be learnt; raise where more stands beside it than that."""
    if any(row.get(name) for name in _REASONING):
        raise _Unusable("with reasoning")
    marks = [row[name] for name in _LEARN if row.get(name) is not None]
    if row.get("train_detail") or any(mark not in (0, 1) for mark in marks):
        raise _Unusable("weighted")
    return all(marks)


def _unanswered(turns: list[Message]) -> Example:
    return Example(task=CHAT, input=turns[-1].text, target="", turns=tuple(turns))


def _content(content: object) -> str:
    """Return the text of a message; raise unless it is one, whole or in parts."""
    if isinstance(content, list):
        if any(part["type"] != "text" for part in content):
            raise ValueError
        return "".join(_unicode(part["text"]) for part in content)
    return _unicode(content)


def _instruction(record: dict[str, object]) -> list[dict[str, object]]:
    """Return the messages of an Alpaca or Dolly record, with LLaMA-Factory's `history`."""
    added = record.get("input") or record.get("context") or ""
    request = (_unicode(record["instruction"]), _unicode(added))
    answer = record["output" if "output" in record else "response"]
    earlier = record.get("history") or []
    if not isinstance(earlier, list):
        raise TypeError
    pairs = [*earlier, ("\n\n".join(text for text in request if text.strip()), answer)]
    return [
        {"role": role, "content": text}
        for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


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


def _intent(text: object, intent: object) -> list[Example]:
    name = _unicode(intent)
    return [_example("intent", text, tool_call(NONE if name == "oos" else name))]


def _call(intent: str, pieces: list[dict[str, str]]) -> list[Example]:
    slots = [(_unicode(piece["entity"]), piece["text"]) for piece in pieces if "entity" in piece]
    text = "".join(piece["text"] for piece in pieces).strip()
    return [_example("call", text, tool_call(intent, slots))]
