"""What is promoted is measured by the commands, word for word."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister import cli, corpus, reference
from cloister.errors import DataError, InvalidText, OutputUnwritable
from cloister_jupyter.regression import promote

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip()))
CALL = '{"name": "none", "arguments": {}}'


@settings(deadline=None)  # each write waits for the disk
@given(st.lists(st.tuples(TEXT, TEXT, st.none() | TEXT), min_size=1, max_size=4))
def test_a_promoted_case_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str | None]]
) -> None:
    path = tmp_path_factory.mktemp("regression") / "cases.jsonl"
    rows = [row for row in rows if row[2] not in ("call", "intent")]
    for prompt, answer, system in rows:
        promote(path, prompt=prompt, answer=answer, system=system)
    wanted = {(system or "", prompt): answer for prompt, answer, system in rows}
    found = corpus.read(path) if rows else []
    assert {(each.task, each.input): each.target for each in found} == wanted


def test_a_case_stands_once_and_the_last_answer_counts(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    assert promote(path, prompt="a", answer="1")
    assert promote(path, prompt="b", answer="1")
    assert not promote(path, prompt="a", answer="1")
    assert promote(path, prompt="a", answer="2", system=None)
    assert [(each.input, each.target) for each in corpus.read(path)] == [("b", "1"), ("a", "2")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_conversations_that_are_in_the_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    record = {"messages": [{"role": "user", "content": "a"},
                           {"role": "assistant", "content": "1"}]}
    path.write_text(json.dumps(record) + "\n")
    before = corpus.read(path)
    promote(path, prompt="b", answer="2", system="call it")
    assert corpus.read(path)[:1] == before


def test_a_conversation_of_the_same_words_is_replaced_and_other_lines_stay_word_for_word(
    tmp_path: Path
) -> None:
    path = tmp_path / "cases.jsonl"
    noted = '{"task": "s", "input": "b", "target": "2", "note": "from the field"}'
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    path.write_text(noted + "\n" + json.dumps(
        {"messages": [*said, {"role": "assistant", "content": "1"}]}))
    before = path.read_text()
    assert not promote(path, prompt="a", answer="1", system="s")
    assert promote(path, prompt="c", answer="3", system="s")
    assert path.read_text().startswith(before + "\n")
    assert promote(path, prompt="a", answer="2", system="s")
    assert [(each.input, each.target) for each in corpus.read(path)] == [
        ("b", "2"), ("c", "3"), ("a", "2")]


def test_what_could_not_be_measured_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    promote(path, prompt="a", answer=CALL, system="call")
    before = path.read_bytes()
    for wrong in ({"prompt": " ", "answer": "x"}, {"prompt": "x", "answer": ""},
                  {"prompt": "x", "answer": "no call", "system": "call"}):
        with pytest.raises(DataError):
            promote(path, **wrong)
    with pytest.raises(InvalidText):
        promote(path, prompt="\ud800", answer="x")
    assert path.read_bytes() == before
    with pytest.raises(DataError, match=r"\.jsonl"):
        promote(tmp_path / "cases.csv", prompt="a", answer="b")
    path.write_text("no JSON\n")
    with pytest.raises(DataError, match="malformed"):
        promote(path, prompt="a", answer="b")
    assert path.read_text() == "no JSON\n"
    with pytest.raises(OutputUnwritable):
        promote(tmp_path / "none" / "cases.jsonl", prompt="a", answer="b")


@pytest.mark.slow
def test_the_commands_read_it_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "regression.jsonl"
    for prompt in ("what is the weather in paris", "play some jazz"):
        promote(path, prompt=prompt, answer=CALL, system="call")
    assert cli.main(["eval", "nano-1", "--data", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 2
    out, quantized = tmp_path / "out.cloister", str(tmp_path / "quantized")
    source = str(reference.checkpoint_path("nano-1"))
    assert cli.main(["quantize", source, "-o", quantized, "--json"]) == 0
    gate = ["export", quantized, "-o", str(out), "--gate-data",
            str(path), "--json", "--gate"]
    assert cli.main([*gate, "frame_exact>=1"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"] == "GateFailed"
    assert not out.exists()
