"""Stored JSON read strictly: every record is what its type says, or refused in one sentence.

A reader names its own error: `refuse` makes it of a complaint such as "eos[...]: Expected `int`,
got `str`". A complaint holds nothing of the content but a field's name, cut to 40 characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec

__all__ = ["Finite", "Label", "Record", "Refuse", "Sha256", "Whole", "build", "decode",
           "decode_lines", "parse", "to_json"]

NESTING = 32  # levels of lists and objects
_T = TypeVar("_T")

Refuse = Callable[[str], Exception]
"""Makes the error to raise of a complaint."""

Whole = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Label = Annotated[str, msgspec.Meta(max_length=100)]
"""A text that can be shown in one line of a terminal: `build` refuses what is not printable."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is stored: fields by name, none missing, none more.

    A subclass says `frozen=True` once more, for type checkers.
    """


def decode(raw: bytes, kind: type[_T], *, limit_bytes: int, refuse: Refuse) -> _T:
    """Read one `kind` out of the JSON object `raw`."""
    return build(parse(raw, limit_bytes=limit_bytes, refuse=refuse), kind, refuse=refuse)


def decode_lines(raw: bytes, kind: type[_T], *, limit_bytes: int, refuse: Refuse) -> list[_T]:
    """Read a `kind` out of every line of `raw`."""
    return [
        decode(line, kind, limit_bytes=limit_bytes, refuse=refuse) for line in raw.splitlines()
    ]


def parse(
    raw: bytes, *, limit_bytes: int, refuse: Refuse, foreign: bool = False
) -> dict[str, object]:
    """Read a JSON object of at most `limit_bytes`, whose keys occur once each.

    With `foreign` it may hold NaN and infinity, which other programs write in Python's spelling.
    """
    if len(raw) > limit_bytes:
        raise refuse(f"it is over {limit_bytes >> 20} MiB")
    try:
        if not foreign:
            msgspec.json.decode(raw)  # json lets NaN and half a surrogate pair through
        value = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise refuse("it is not valid JSON") from None
    if not isinstance(value, dict):
        raise refuse("it is no JSON object")
    level: list[object] = [value]
    for _ in range(NESTING):
        level = [
            child for node in level if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise refuse(f"it is nested more than {NESTING} deep")
    return value


def build(value: object, kind: type[_T], *, refuse: Refuse) -> _T:
    """Make a `kind` of what `parse` read; no type stands for another, but 1 for 1.0."""
    try:
        record = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise refuse(_complaint(str(error))) from None
    kept = msgspec.to_builtins(record, builtin_types=())
    unknown = _unknown(value, kept)  # msgspec passes over them in a dataclass
    if unknown is not None:
        raise refuse(f"it has an unknown field {_shown(unknown)}")
    return record


def to_json(record: object) -> str:
    """The text that reads back as `record`; the same record always gives the same text."""
    return json.dumps(msgspec.to_builtins(record), indent=1, sort_keys=True) + "\n"


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key occurs twice")
    return record


def _unknown(given: object, kept: object) -> str | None:
    """A key of `given` that `kept` has not, at any level."""
    if isinstance(given, dict) and isinstance(kept, dict):
        extra = min(given.keys() - kept.keys(), default=None)
        inner = (_unknown(given[key], kept[key]) for key in given.keys() & kept.keys())
        return extra if extra is not None else next(filter(None, inner), None)
    if isinstance(given, list) and isinstance(kept, list | tuple):
        return next(filter(None, map(_unknown, given, kept)), None)
    return None


def _complaint(said: str) -> str:
    """What msgspec said, without the content that it quotes."""
    found = re.fullmatch(r"(.*?)(?: - at `\$\.?([\w.\[\]]{0,80})`)?", said, re.DOTALL)
    assert found is not None
    what, where = found.groups()
    if what.startswith("Invalid enum value"):
        what = "not one of the values it may have"
    elif name := re.fullmatch("Object contains unknown field `(.*)`", what, re.DOTALL):
        what = f"an unknown field {_shown(name[1])}"
    return f"{_shown(where)}: {what[:200]}" if where else what[:200]


def _shown(name: str) -> str:
    return ascii(name[:40])[1:-1]
