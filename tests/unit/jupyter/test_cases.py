"""Tables are read as they were meant, or refused by their line."""

from __future__ import annotations

import csv
import io
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, DataError, InvalidText, SettingError
from cloister_jupyter.cases import (
    MOST_CASES,
    TABLE_BYTES,
    Case,
    Table,
    Template,
    blocks,
    load_table,
    read_table,
    seeds,
)

PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def case(**values: str) -> Case:
    return Case(line=2, values=values)


def test_variables_are_filled_and_doubled_braces_stay() -> None:
    template = Template('Answer {{"city": "{city}"}} for { first name } in {city}.')
    assert template.variables == ("city", "first name")
    assert template.render(case(city="{Paris}", **{"first name": "A"})) == (
        'Answer {"city": "{Paris}"} for A in {Paris}.')
    assert Template("no variable").render(case()) == "no variable"


@given(PLAIN, PLAIN)
def test_what_is_doubled_and_what_is_put_in_come_back_as_they_were(text: str, value: str) -> None:
    doubled = text.replace("{", "{{").replace("}", "}}")
    assert Template(f"{doubled}{{x}}").render(case(x=value)) == text + value


@pytest.mark.parametrize("text", [
    "one\ntwo {", "one\ntwo }", "one\n{}", 'one\n{"a": 1}', "one\n{1st}", "one\n{a\nb}",
    "one\n{{a}", "one\n{a}}"])
def test_a_brace_that_belongs_to_no_variable_is_refused_by_its_line(text: str) -> None:
    with pytest.raises(SettingError, match="line 2 of the template"):
        Template(text)


def test_a_missing_variable_is_refused_by_name_and_line() -> None:
    with pytest.raises(DataError, match="line 2 has no value for the variable town"):
        Template("{city} {town}").render(case(city="x"))


@pytest.mark.parametrize("delimiter", ",;\t")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_as_a_spreadsheet_wrote_it(delimiter: str, end: str, mark: str) -> None:
    rows = [["text", "note, or; not", "Expected", "check"],
            ['a "quoted", cell; with\nline ends\tand tabs', "", "yes", "contains: y"],
            ["plain", " kept ", "", ""]]
    rows[0][1] = "note"
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(rows)
    one, two = read_table(mark + out.getvalue() + end)
    assert (one.line, one.values) == (2, {"text": rows[1][0], "note": ""})
    assert (one.expected, one.check) == ("yes", "contains: y")
    assert (two.line, two.values["note"], two.expected, two.check) == (4, " kept ", None, None)


@given(st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=5), st.sampled_from(",;\t"))
def test_every_cell_comes_back_as_it_was_written(
    rows: list[tuple[str, str]], delimiter: str
) -> None:
    kept = [row for row in rows if any(map(str.strip, row))]
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([("a", "b"), *kept])
    if not kept:
        with pytest.raises(DataError, match="no case"):
            read_table(out.getvalue())
    else:
        found = read_table(out.getvalue())
        assert [(each.values["a"], each.values["b"]) for each in found] == kept


def test_excel_says_the_delimiter_in_a_line_of_its_own() -> None:
    (found,) = read_table("sep=;\r\na,b;c\r\n1,2;3\r\n".replace("a,b", "ab"))
    assert (found.line, found.values) == (3, {"ab": "1,2", "c": "3"})


def test_json_lines_hold_texts_numbers_and_objects() -> None:
    one, two = read_table(
        '\ufeff{"city": "Paris\\nFrance", "n": 3, "expected": {"a": [1]}}\n\n'
        '{"city": "a\u2028b", "check": {"contains": "x"}, "expected": null}\n')
    assert one.values == {"city": "Paris\nFrance", "n": "3"}
    assert json.loads(one.expected or "") == {"a": [1]}
    assert (two.line, two.values, two.expected) == (3, {"city": "a\u2028b"}, None)
    assert json.loads(two.check or "") == {"contains": "x"}


@pytest.mark.parametrize(("text", "message"), [
    ("", "no case"), ("   \n\n", "no case"), ("a,b\n", "no case"),
    ("a,b\n1,2\n\n1,2,3\n", "Line 4 of the table has 3 fields and the heading 2"),
    ("a,b\n\"1\n2\",2\n1\n", "Line 4 of the table has 1 fields"),
    ("a,b\n\"1\"x,2\n", "begins in line 2 has a quote"),
    ("a,b\n1,\"2\n3,4\n", "begins in line 2 has a quote"),
    ("a,b\n1," + "x" * 200_000, "line 2 has a field that is too large"),
    ("a,,c\n1,2,3\n", "heading of column 2 in line 1"),
    ("a,b,a\n1,2,3\n", "Column 3 in line 1"),
    ('{"a": 1}\n{"a": \n', "Line 2 of the table is no JSON object"),
    ('{"a": 1}\n[1]\n', "Line 2 of the table is no JSON object"),
    ('{"a": 1}\n' + "[" * 100_000, "Line 2 of the table is no JSON object"),
    ('{"a": 1, "a": 2}\n', "Line 1 of the table is no JSON object"),
    ('{"": 1}\n', "heading of column 1 in line 1"),
    ("a\n" + "x\n" * (MOST_CASES + 1), f"more than {MOST_CASES:,} cases"),
    ("a\n" + "x" * TABLE_BYTES, f"at most {TABLE_BYTES:,}"),
])
def test_what_is_wrong_is_refused_by_its_line(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(text)


def test_half_a_character_is_refused() -> None:
    for text in ("a\nx\ud800\n", '{"a": "\\ud800"}'):
        with pytest.raises(InvalidText):
            read_table(text)


@given(st.text(max_size=200))
def test_no_text_ends_in_an_error_that_is_not_ours(text: str) -> None:
    with suppress(CloisterError):
        read_table(text)


def test_a_file_is_read_in_what_spreadsheets_save(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text("city\tn\nZ\u00fcrich\t1\n", encoding)
        (found,) = load_table(path)
        assert found.values == {"city": "Z\u00fcrich", "n": "1"}
    path.write_bytes("city\nZ\u00fcrich\n".encode("latin1"))
    with pytest.raises(DataError, match=r"cases\.csv is not UTF-8"):
        load_table(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_table(tmp_path / "none.csv")


def test_neither_repr_nor_error_shows_a_cell() -> None:
    (found,) = read_table("a,expected\nsecret,hidden\n")
    assert "secret" not in repr(found) and "hidden" not in repr(found)
    with pytest.raises(DataError) as caught:
        read_table("a,b\nsecret\n")
    assert "secret" not in str(caught.value)


def test_templates_stand_in_blocks_and_seeds_in_ranges() -> None:
    found = blocks("say {x}\n\n----\r\n---\nplease\n---not a line\n{y}\n--- \n")
    assert [each.variables for each in found] == [("x",), ("y",)]
    assert found[0].render(Case(line=1, values={"x": "---"})) == "say ---\n"
    assert blocks(" \n---\n") == ()
    assert seeds("1-3, 9") == (1, 2, 3, 9) and seeds(" ") == (None,)
    for wrong in ("1-", "-1", "3-1", "1.5", "one", "1-1001", "\u0661"):
        with pytest.raises(SettingError):
            seeds(wrong)


def test_a_table_that_is_edited_is_kept_and_read_as_it_was() -> None:
    table = Table(read_table("x,y,expected\n1,2,\n,\"a\nb\",c\n"))
    table.edit(0, 0, "new")
    table.edit(0, 2, "wanted")
    table.edit(0, 3, "contains: a")
    table.edit(1, 2, " ")
    assert table.cases[0] == Case(line=2, values={"x": "new", "y": "2"}, expected="wanted",
                                  check="contains: a")
    assert table.cases[1].expected is None and table.cell(1, 2) == ""
    table.insert(1)
    table.remove(0)
    again = Table(read_table(table.to_json()), table.columns[:-2])
    assert again.columns == table.columns == ("x", "y", "expected", "check")
    assert [case.values for case in again.cases] == [
        {"x": "", "y": ""}, {"x": "", "y": "a\nb"}]
    with pytest.raises(InvalidText):
        table.edit(0, 0, "\ud800")
    assert "a" not in repr(table).removeprefix("Table").replace("cases", "")
    assert len(Table(variables=("x",)).cases) == 1 and not Table().cases
