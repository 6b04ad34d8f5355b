"""`cloister eval` and the gate say which model is which, and refuse before the long work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cloister import reference
from cloister.bundle import Bundle
from cloister.cli import main
from cloister.evaluate import report

NANO = reference.checkpoint_path("nano-1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four calls and two requests out of scope, as JSON lines."""
    rows = [
        {"task": "call", "input": f"play number {i}", "target": json.dumps(
            {"name": "PlayMusic", "arguments": {"track": f"number {i}"}})}
        for i in range(4)
    ] + [{"task": "intent", "input": f"why {i}", "target": '{"name": "none", "arguments": {}}'}
         for i in range(2)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be evaluated."""
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(report, "evaluate", refuse)


def done(capfd: pytest.CaptureFixture[str], *arguments: object) -> Any:
    code = main([*map(str, arguments), "--json"])
    out, said = capfd.readouterr()
    assert code == 0, said
    return json.loads(out)


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 1
    return capfd.readouterr().err.splitlines()[-1]


def test_models_of_one_name_are_told_apart_by_where_they_lie(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        shutil.copytree(NANO, tmp_path / folder / "m")
    found = done(capfd, "eval", tmp_path / "a" / "m", tmp_path / "b" / "m", "--data", data,
                 "--limit", "1")
    assert [each["model"] for each in found["reports"]] == ["a/m", "b/m"]
    assert list(found["divided"]) == ["a/m", "b/m"]


def test_pro_is_the_measure_wherever_it_stands_and_the_first_where_it_is_missing(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(NANO, tmp_path / "pro.cloister")
    shutil.copytree(NANO, tmp_path / "other")
    for models, base in (((NANO, tmp_path / "pro.cloister"), "pro.cloister"),
                         ((NANO, tmp_path / "other"), "nano-1")):
        found = done(capfd, "eval", *models, "--data", data, "--limit", "1")
        assert found["base"] == base


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("more", "said"), [
    (("--picture", "board.docx"), "no picture file"),
    (("--picture", "absent/board.png"), "board.png has no directory"),
    ((NANO,), "one name"),
])
def test_what_cannot_be_done_is_refused_before_anything_is_evaluated(
    data: Path, more: tuple[object, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capfd, "eval", NANO, *more, "--data", data)


def test_a_sample_spreads_over_the_data(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Files are sorted by intent: the first three would all be of one task."""
    found = done(capfd, "eval", NANO, "--data", data, "--limit", "3")
    assert found["n"] == 3
    assert {"call.frame_exact", "intent.oos_recall"} <= set(found["metrics"])


def test_a_receipt_keeps_what_was_measured_on_more(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "n.cloister"
    shutil.copytree(reference.bundle_path("nano-1"), bundle)
    before = Bundle.open(bundle)
    for more in ((), ("--limit", "2"), ("--task", "call"), ("--against", NANO)):
        done(capfd, "eval", bundle, "--data", data, "--record", *more)
    after = Bundle.open(bundle)
    after.verify()
    found = after.receipt()["evaluations"]
    shipped = Bundle.open(reference.bundle_path("nano-1")).receipt()["evaluations"]
    assert isinstance(found, dict)
    assert isinstance(shipped, dict)
    assert {name: found[name] for name in shipped} == shipped
    evaluations = {name: each for name, each in found.items() if name not in shipped}
    assert list(evaluations) == [
        "own.jsonl", "own.jsonl, 2 of 6", "own.jsonl, call", "own.jsonl against nano-1"]
    assert [each["n"] for each in evaluations.values()] == [6, 2, 4, 6]
    kept = {key: value for key, value in after.receipt().items() if key != "evaluations"}
    assert kept == {key: value for key, value in before.receipt().items() if key != "evaluations"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.cloister", "own.jsonl"]


def test_a_gate_on_divergence_asks_from_what_before_it_exports(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister.pipeline.export", None)
    said = refused(capfd, "export", NANO, "-o", tmp_path / "out", "--gate", "exact>=0,flips<=1",
                   "--gate-data", data)
    assert "flips compares two models" in said
    assert "--gate-against" in said


@pytest.mark.slow
def test_a_gate_speaks_of_the_bundle_by_the_name_that_it_was_to_have(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"task": "redact", "input": "zebra " * 2000, "target": "x"}))
    done(capfd, "quantize", NANO, "-o", tmp_path / "q")
    said = refused(capfd, "export", tmp_path / "q", "-o", tmp_path / "mine.cloister",
                   "--gate", "exact>=0", "--gate-data", long)
    assert "long.jsonl:1 has" in said
    assert "of mine.cloister holds" in said
    assert "zebra" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.jsonl", "q"]
