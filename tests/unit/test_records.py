"""Stored JSON is what its type says, or refused in a sentence that quotes none of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest

from cloister import records
from cloister.errors import DataError, SettingError
from cloister.records import Finite, Record, Whole


class Kind(StrEnum):
    ONE = "one"


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A dataclass, of which msgspec alone passes over unknown fields."""

    size: int
    flag: bool = False
    rate: float = 1.0
    kind: Kind = Kind.ONE

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SettingError("size must be at least 1")


class Outer(Record, frozen=True):
    inner: Inner
    ids: tuple[Whole, ...]
    counts: dict[str, Whole]
    margin: Finite


GOOD: dict[str, Any] = {"inner": {"size": 1}, "ids": [1, 2], "counts": {"x": 1}, "margin": 1}


def read(raw: bytes) -> Outer:
    return records.decode(raw, Outer, limit_bytes=1 << 20, refuse=DataError)


def test_what_was_written_reads_back_the_same() -> None:
    found = read(json.dumps(GOOD).encode())
    assert (found.inner.size, found.ids, found.margin) == (1, (1, 2), 1.0)
    assert read(records.to_json(found).encode()) == found


@pytest.mark.parametrize(("change", "said"), [
    ({"ids": [1, True]}, r"ids\[1\]: Expected `int`, got `bool`"),
    ({"ids": [1.0]}, r"ids\[0\]: Expected `int`, got `float`"), ({"ids": [-1]}, "ids"),
    ({"ids": [2**63]}, "ids"), ({"ids": [2**80]}, "ids"), ({"ids": "12"}, "ids"),
    ({"ids": None}, "ids"), ({"ids": {"0": 1}}, "ids"), ({"margin": True}, "margin"),
    ({"margin": "1"}, "margin"), ({"margin": 1e308}, "margin"), ({"counts": {"secret": -1}},
                                                                  r"counts\[\.\.\.\]"),
    ({"inner": {"size": 0}}, "inner: size must be at least 1"), ({"inner": {}}, "size"),
    ({"inner": {"size": 1, "flag": 1}}, "flag"), ({"inner": {"size": 1, "rate": "x"}}, "rate"),
    ({"inner": {"size": 1, "secret": 2}}, "unknown field secret"), ({"more": 1}, "field more"),
    ({"inner": {"size": 1, "kind": "secret"}}, "inner.kind: not one of"), ({"inner": []}, "inner"),
])
def test_a_value_of_another_kind_is_refused_by_its_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(json.dumps({**GOOD, **change}).encode())


def test_a_missing_field_is_refused_by_name() -> None:
    for name in GOOD:
        with pytest.raises(DataError, match=name):
            read(json.dumps({key: value for key, value in GOOD.items() if key != name}).encode())


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"1", b"\xff", b"\xef\xbb\xbf{}", b'{"a": NaN}', b'{"a": 1, "a": 1}',
    b'{"a": {"b": 1, "b": 2}}', b'{"a": -Infinity}', b'{"\\ud800": 1}', b'{"a": 1} {}',
    b"[" * 100_000, b'{"a":' * 33 + b"1" + b"}" * 33, b'{"a": ' + b"9" * 5000 + b"}",
    '{"a": 1}'.encode("utf-16"), b'{"a": "' + b"x" * (1 << 20) + b'"}',
])
def test_what_is_no_plain_object_is_refused(raw: bytes) -> None:
    with pytest.raises(DataError):
        records.parse(raw, limit_bytes=1 << 20, refuse=DataError)


def test_what_others_wrote_may_hold_numbers_that_are_none() -> None:
    found = records.parse(b'{"a": NaN}', limit_bytes=99, refuse=DataError, foreign=True)
    assert found["a"] != found["a"]


@pytest.mark.parametrize("name", ["x" * 500, "\x1b[2J", "` - at `$.secret", "\u202e", "a\nb"])
def test_a_complaint_shows_a_field_name_in_print_and_cut_and_nothing_else(name: str) -> None:
    hidden = "confidential"
    for record in ({**GOOD, name: hidden}, {**GOOD, "inner": {"size": 1, name: hidden}},
                   {**GOOD, "counts": {name: hidden}}, {**GOOD, "inner": {"kind": hidden}}):
        with pytest.raises(DataError) as caught:
            read(json.dumps(record).encode())
        said = str(caught.value)
        assert hidden not in said
        assert said.isprintable() and said.isascii()
        assert "x" * 41 not in said
        assert len(said) < 120


def test_lines_are_read_one_by_one() -> None:
    line = json.dumps(GOOD).encode()
    found = records.decode_lines(line + b"\n" + line + b"\n", Outer, limit_bytes=999,
                                 refuse=DataError)
    assert len(found) == 2
    with pytest.raises(DataError):
        records.decode_lines(line + b"\n\n", Outer, limit_bytes=999, refuse=DataError)
