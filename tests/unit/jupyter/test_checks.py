"""An answer is judged by its case, and a check that goes wrong fails that case alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, SettingError
from cloister_jupyter.cases import Case
from cloister_jupyter.checks import Check, Judge, Outcome, parse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=3), inner, max_size=3), max_leaves=8)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(limit_s=0.5) as made:
        yield made


def case(check: Any = None, expected: str | None = None) -> Case:
    if check is not None and not isinstance(check, str):
        check = json.dumps(check)
    return Case(line=7, values={}, expected=expected, check=check)


@pytest.mark.parametrize(("check", "right", "wrong"), [
    ("exact: a b", " a b\n", "a  b"),
    ("contains: Paris", "It is Paris.", "It is paris."),
    ({"contains": ["a", "b"]}, "b a", "a"),
    ("regex: (?i)^par.s$", "Paris", "in Paris"),
    ({"json": {"city": "Paris", "n": 1, "at.0": "x"}},
     '```json\n{"n": 1.0, "city": "Paris", "at": ["x"], "more": 2}\n```',
     '{"n": true, "city": "Paris", "at": ["x"]}'),
    ({"json": {"a.b": 1}}, '{"a.b": 1, "a": {"b": 2}}', '{"a": {"b": 2}}'),
    ({"json": {"a." + "9" * 5000: None, "a": [1]}}, f'{{"a": [1], "a.{"9" * 5000}": null}}',
     '{"a": [1]}'),
    ({"json": {"a": None}}, '{"a": null}', "{}"),
    ({"schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', '{"b": 1}'),
    ({"schema": {"$defs": {"x": {"type": "integer"}}, "$ref": "#/$defs/x"}}, "3", '"3"'),
])
def test_each_kind_tells_a_right_answer_from_a_wrong_one(
    judge: Judge, check: Any, right: str, wrong: str
) -> None:
    assert judge.prepare([case(check)]) == 1
    assert judge.judge(case(check), right) == Outcome(True)
    outcome = judge.judge(case(check), wrong)
    assert outcome is not None and not outcome.passed and outcome.why


def test_without_a_check_the_wanted_answer_decides_and_without_that_nothing(judge: Judge) -> None:
    assert judge.judge(case(expected="yes"), "yes ") == Outcome(True)
    assert judge.judge(case(), "yes") is None
    assert judge.prepare([case(), case(expected="x")]) == 1


def test_the_fields_that_differ_are_named_and_those_of_the_wanted_answer_are_the_default(
    judge: Judge
) -> None:
    wanted = case("json", '{"a": 1, "b": [2], "c": {"d": 3}}')
    assert judge.judge(wanted, '{"c": {"d": 3}, "b": [2], "a": 1}') == Outcome(True)
    outcome = judge.judge(wanted, '{"a": 1, "b": [3], "c": {"d": 4}}')
    assert outcome is not None and outcome.fields == ("b", "c")
    for answer in ("no", "[" * 100_000, "NaN", "[1]", "1" * 5000,
                   '{"a": 1, "b": [2], "c": {"d": 4, "d": 3}}'):
        outcome = judge.judge(wanted, answer)
        assert outcome is not None and not outcome.passed


def test_a_kind_alone_compares_with_what_is_expected() -> None:
    with Judge(default=Check("contains")) as judge:
        assert judge.judge(case(expected="Paris"), "in Paris") == Outcome(True)
        assert judge.judge(case("exact", expected="Paris"), "in Paris") != Outcome(True)
        assert judge.judge(case("regex", expected="^P"), "Paris") == Outcome(True)
        assert judge.judge(case(), "Paris") is None
        for check, wanted in (("regex", None), ("json", "[1]"), ("json", "x")):
            with pytest.raises(SettingError, match="line 7 needs"):
                judge.prepare([case(check, wanted)])


@given(JSON)
def test_what_is_the_same_json_passes_whatever_it_holds(value: object) -> None:
    wanted = case({"json": {"x": value}})
    outcome = Judge().judge(wanted, json.dumps({"x": value}))
    assert outcome == Outcome(True)


def test_a_function_that_raises_fails_its_case_by_the_type_of_the_error() -> None:
    def strict(answer: str, case: Case) -> bool:
        if answer == "exit":
            raise SystemExit(3)
        if answer == "deep":
            return strict(answer, case)
        return {"yes": True, "no": False}[answer]

    judge = Judge(functions={"strict": strict})
    wanted = case("function: strict")
    said = {answer: judge.judge(wanted, answer) for answer in ("yes", "no", "my own secret")}
    assert said["yes"] == Outcome(True) and said["no"] == Outcome(False)
    assert said["my own secret"] == Outcome(False, "KeyError")
    assert judge.judge(wanted, "exit") == Outcome(False, "SystemExit")
    assert judge.judge(wanted, "deep") == Outcome(False, "RecursionError")
    assert Judge(default=strict).judge(case(expected="other"), "yes") == Outcome(True)
    returned = Judge(default=lambda *_: "yes").judge(case(), "yes")  # type: ignore[arg-type]
    assert returned == Outcome(False, "the function returned str, not True or False")
    with pytest.raises(KeyboardInterrupt):  # the user's own
        Judge(default=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)).judge(case(), "x")


@pytest.mark.parametrize("check", [
    {"regex": "^(a+)+$"}, {"schema": {"type": "string", "pattern": "^(a+)+$"}}])
def test_a_search_without_end_fails_its_case_in_time_and_the_next_one_goes_on(
    judge: Judge, check: Any
) -> None:
    answer = "a" * 50 + "!"
    judge.prepare([case(check)])
    begin = time.monotonic()
    outcome = judge.judge(case(check), answer if "regex" in check else json.dumps(answer))
    assert outcome == Outcome(False, "TimeoutError")
    assert time.monotonic() - begin < 5
    assert judge.judge(case("regex: a"), "a") == Outcome(True)


def test_a_process_that_died_is_begun_anew(judge: Judge) -> None:
    assert judge.judge(case("regex: a"), "a") == Outcome(True)
    process = judge._search._process
    assert process is not None
    process.kill()
    process.wait()
    assert judge.judge(case("regex: a"), "a") == Outcome(True)


@pytest.mark.parametrize("check", [
    "", "  ", "Paris", "like: x", "contains:", "regex:", {"contains": 1}, {"contains": [1]},
    {"exact": "a", "contains": "b"}, {"json": []}, {"schema": "x"}, {}, "[1]", "{", "schema: {",
])
def test_what_is_no_check_is_refused_by_its_line(check: Any) -> None:
    with pytest.raises(SettingError, match="line 7"):
        parse(check if isinstance(check, str) else json.dumps(check), 7)


@given(st.text(max_size=50))
def test_no_text_ends_in_an_error_that_is_not_ours(text: str) -> None:
    with suppress(CloisterError):
        assert parse(text).kind


@pytest.mark.parametrize(("check", "why"), [
    ("function: other", "names a function"), ("regex: (", "expression that cannot be read"),
    ({"schema": {"type": "objeckt"}}, "schema that cannot be read"), ("json", "needs a JSON"),
    ({"schema": {"allOf": [{"$ref": "https://example.org/s.json"}]}}, "never fetched"),
])
def test_what_could_never_pass_is_refused_before_anything_is_asked(
    judge: Judge, check: Any, why: str
) -> None:
    with pytest.raises(SettingError, match=f"line 7 .*{why}"):
        judge.prepare([case(check)])


def test_neither_check_nor_outcome_shows_a_text(judge: Judge) -> None:
    assert "secret" not in repr(parse("contains: secret"))
    assert "secret" not in repr(judge.judge(case({"json": {"secret": 1}}), '{"secret": 2}'))
