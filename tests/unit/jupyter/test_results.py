"""Results in files: what a spreadsheet, a browser and a data frame read is what was said."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cloister.audit.canary import Canary, search
from cloister.errors import (
    DataError,
    InvalidText,
    OutputExists,
    OutputUnwritable,
    RedactionFailed,
    SettingError,
)
from cloister.reference.redaction import generate
from cloister_jupyter.proposals import propose, spans
from cloister_jupyter.redaction import Redaction, Value
from cloister_jupyter.results import FORMATS, export, unguarded

ROWS: list[dict[str, Any]] = [
    {"tier": "pro", "prompt": "call Ada Byron", "answer": "ADA BYRON\nsaid \"no\"", "tokens": 7,
     "ttft_s": 0.5, "ok": True, "why": None},
    {"tier": "nano-1", "prompt": "call Ada Byron", "answer": "\u4f60\u597d <b>\U0001f426</b>",
     "tokens": 9, "ttft_s": 1, "ok": False, "more": {"a": [1]}},
]
ADA = Redaction([Value(text="Ada Byron", label="NAME", by="you")])


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(parquet.read_table(path).to_pylist())
    text = path.read_bytes().decode("utf-8-sig")
    return [{name: unguarded(cell) for name, cell in row.items()}
            for row in csv.DictReader(io.StringIO(text, newline=""))]


def shown(path: Path) -> str:
    """What a reader of a page sees."""
    body = path.read_text("utf-8").partition("<body>")[2]
    return html.unescape(re.sub("<[^>]*>", "", body))


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_format_holds_what_was_said_and_only_its_owner_reads_it(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"out{suffix}"
    written = export(ROWS, path, redact=False)
    assert (written.path, written.rows, written.searched) == (path, 2, None)
    assert written.size_bytes == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    if suffix == ".html":
        for row in ROWS:
            assert row["answer"] in shown(path) and row["tier"] in shown(path)
        return
    for row, wanted in zip(read(path), ROWS, strict=True):
        assert row["answer"] == wanted["answer"]
        assert float(row["ttft_s"]) == wanted["ttft_s"] and int(row["tokens"]) == wanted["tokens"]
    assert json.loads(read(path)[1]["more"]) == {"a": [1]}


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_value_is_gone_from_every_row_and_the_control_finds_it(
    tmp_path: Path, suffix: str
) -> None:
    plain, path = tmp_path / "plain", tmp_path / "redacted"
    plain.mkdir()
    path.mkdir()
    canary = [Canary("name", "Ada Byron")]
    export(ROWS, plain / f"a{suffix}", redact=False)
    assert search(plain, canary, least_bytes=8)
    written = export(ROWS, path / f"a{suffix}", redact=ADA)
    assert (written.replaced, written.searched) == ({"NAME": 3}, 1)
    assert not search(path, canary, least_bytes=8)
    text = (path / f"a{suffix}").read_bytes().decode("utf-8", "replace")
    assert text.count("[NAME 1]") >= 1 and "byron" not in text.lower()
    assert "Ada" not in repr(written)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("encode", [
    lambda text: base64.b64encode(b"xx" + text.encode()).decode(),
    lambda text: text.encode().hex(), quote, quote_plus,
    lambda text: "".join(f"\\u{ord(sign):04x}" if not sign.isascii() else sign for sign in text),
    lambda text: "".join(f"\\u{ord(sign):04X}" for sign in text.upper()),
    lambda text: json.dumps(json.dumps(text)),
    lambda text: quote(text.upper()).lower(), lambda text: quote(quote(text.lower())),
    lambda text: text.replace("-", "&#45;").replace("\u00e9", "&eacute;"),
    lambda text: text.replace("-", "\\-"), lambda text: text.replace("-", "<b>-</b>")])
def test_a_file_that_would_still_hold_one_is_never_there(
    tmp_path: Path, suffix: str, encode: Any
) -> None:
    """As where a tier was asked to write a name in base64: the words are replaced, that is not."""
    name = "Ren\u00e9e Quartz-Zephyr"
    rows = [{"answer": f"In base64: {encode(name)}", "prompt": name}]
    redaction = Redaction([Value(text=name, label="NAME", by="you")])
    path = tmp_path / f"out{suffix}"
    path.write_text("mine")
    with pytest.raises(RedactionFailed) as error:
        export(rows, path, redact=redaction, replace=True)
    assert f"{path.name} would still hold 1 of the 1 values" in str(error.value)
    assert "Quartz" not in str(error.value)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_value_that_two_cells_make_together_is_none(tmp_path: Path, suffix: str) -> None:
    rows = [{"a": "the old king", "b": "daughter of"}, {"a": "king", "b": "king"}]
    redaction = Redaction([Value(text="king daughter", label="NAME", by="you")])
    assert export(rows, tmp_path / f"a{suffix}", redact=redaction).replaced == {}


@pytest.mark.parametrize("suffix", FORMATS)
def test_headings_and_the_title_are_redacted_too(tmp_path: Path, suffix: str) -> None:
    path, rows = tmp_path / f"a{suffix}", [{"Ada Byron": "x", "ada byron": "y", "n": 1}]
    assert export(rows, path, redact=ADA, title="Of Ada Byron").replaced == {}
    text = path.read_bytes().decode("utf-8", "replace")
    assert "byron" not in text.lower() and "[NAME 1]" in text and "[NAME 1] 2" in text


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_value_is_replaced_in_numbers_too_and_others_stay_numbers(
    tmp_path: Path, suffix: str
) -> None:
    redaction = Redaction([Value(text="2079460958", label="PHONE", by="you"),
                           Value(text="958", label="CODE", by="you")])
    written = export([{"a": 2079460958.0, "b": 2079460958, "c": 0.958, "d": 0.25}],
                     tmp_path / f"out{suffix}", redact=redaction)
    assert written.replaced == {"PHONE": 2, "CODE": 1}
    if suffix == ".parquet":
        assert parquet.read_table(written.path).to_pylist() == [
            {"a": "[PHONE 1]", "b": "[PHONE 1]", "c": "0.[CODE 1]", "d": 0.25}]


def test_words_of_the_frame_do_not_stop_an_export(tmp_path: Path) -> None:
    rows = [{"answer": "the answer is viewport", "caption": "a"}, {"answer": "b", "caption": "c"}]
    redaction = Redaction([
        Value(text=text, label="TEXT", by="you") for text in ("answer", "viewport", "caption")])
    for suffix in FORMATS:
        written = export(rows, tmp_path / f"out{suffix}", redact=redaction)
        assert written.replaced == {"TEXT": 2}


@pytest.mark.slow
def test_of_invented_texts_no_value_that_was_proposed_is_left(tmp_path: Path) -> None:
    examples = list(generate(120, seed=77, development=True))
    rows = [{"tier": "x", "prompt": each.input, "answer": each.input.upper()} for each in examples]
    redaction = propose([row["prompt"] for row in rows])
    assert redaction is not None
    marked = [redaction.values[number].text for number in redaction.on]
    wanted = [each.input[start:end] for each in examples
              for start, end, _ in spans(each.input, each.target)[0]]
    for suffix in FORMATS:
        path = tmp_path / suffix / f"out{suffix}"
        path.parent.mkdir()
        written = export(rows, path, redact=redaction)
        text = path.read_bytes().decode("utf-8", "replace").casefold()
        assert written.searched == len(marked) > 200
        assert [each for each in marked if len(each) > 7 and each.casefold() in text] == []
        left = [each for each in wanted if len(each) > 7 and each.casefold() in text]
        print(f"{suffix}: {len(left)} of {len(wanted)} values that were put in are left")
        assert len(left) <= 0.01 * len(wanted)


FORMULAS = ("=1+1", "+1", "-1", "@x", "\tx", "\rx", "\nx", "\uff1d1", "'=1", "''=1")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_sees_no_formula_and_a_reader_gets_it_back(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "a.csv"
    export([{text: text, "n": -1, "b": f'x",{text}'}], path, redact=False, bom=True)
    raw = path.read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    (heading, row) = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""))
    assert heading[0] == row[0] == "'" + text and row[1] == "-1"
    assert unguarded(row[0]) == text and row[2] == f'x",{text}'
    assert unguarded("'tis") == "'tis" and unguarded("") == ""


@given(st.text(), st.text(max_size=3))
def test_any_text_of_a_csv_reads_back(
    tmp_path_factory: pytest.TempPathFactory, text: str, before: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    rows = [{"a": before + text, "b": text}]
    export(rows, path, redact=False)
    assert read(path) == rows


def test_a_page_loads_nothing_runs_nothing_and_shows_text_as_text(tmp_path: Path) -> None:
    hostile = ("<img src=x onerror=alert(1)> <script>alert(1)</script> \x1b[31m \u202e rtl "
               "https://example.com/a.png ![a](b) &amp; \u200b")
    path = tmp_path / "a.html"
    export([{hostile: hostile, "tier": "pro"}, {hostile: "x", "tier": "pro"}], path, redact=False,
           title=hostile)
    page = path.read_text("utf-8")
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    found: list[tuple[str, Any]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, attrs))  # type: ignore[method-assign]
    parser.feed(page)
    assert not {tag for tag, _ in found} & {
        "script", "img", "link", "iframe", "a", "form", "object", "base", "svg"}
    assert {name for _, attrs in found for name, _ in attrs} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "role", "aria-label", "scope",
        "tabindex", "dir"}
    assert not re.search(r"@import|url\(", page.partition("</style>")[0])
    assert "\x1b" not in page and "\u202e" not in page and "\u27e8U+202E\u27e9" in page
    assert "<script>alert(1)</script>" in shown(path) and "&amp;" in shown(path)
    assert page.count('scope="col"') == 1 and "<dt>tier</dt>" in page


@pytest.mark.parametrize(("rows", "name", "error", "words"), [
    ([], "a.csv", DataError, "run something"),
    (ROWS, "a.xlsx", SettingError, r"\.csv, \.parquet, \.html"),
    (ROWS, "none/a.csv", OutputUnwritable, "does not exist"),
    (ROWS, "a\0.csv", OutputUnwritable, "zero byte"),
    ([{"a": "\ud800"}], "a.csv", InvalidText, "half a character"),
    (ROWS * 60_000, "a.csv", DataError, "120,000 rows"),
])
def test_what_cannot_be_written_is_refused_by_name(
    tmp_path: Path, rows: Any, name: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        export(rows, tmp_path / name, redact=False)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over_unless_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("mine")
    with pytest.raises(OutputExists, match="name another"):
        export(ROWS, path, redact=False)
    assert path.read_text() == "mine"
    export(ROWS, path, redact=False, replace=True)
    assert len(read(path)) == 2
    (tmp_path / "link.csv").symlink_to(path)
    (tmp_path / "folder.csv").mkdir()
    for name in ("link.csv", "folder.csv"):
        with pytest.raises(OutputExists):
            export(ROWS, tmp_path / name, redact=False, replace=True)
    monkeypatch.setattr("cloister_jupyter.results._check", lambda *args, **options: None)
    with pytest.raises(OutputExists):  # it came there while this one was written
        export(ROWS, path, redact=False)


def test_columns_of_mixed_kinds_become_text_in_parquet(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": 1, "c": 2**70, "d": None}, {"a": "x", "b": 0.5, "c": 1, "d": None}]
    export(rows, tmp_path / "a.parquet", redact=False)
    assert read(tmp_path / "a.parquet") == [
        {"a": "1", "b": 1.0, "c": str(2**70), "d": None}, {"a": "x", "b": 0.5, "c": "1", "d": None}]


def test_without_pyarrow_parquet_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(SettingError, match="pip install"):
        export(ROWS, tmp_path / "a.parquet", redact=False)
    assert list(tmp_path.iterdir()) == []
