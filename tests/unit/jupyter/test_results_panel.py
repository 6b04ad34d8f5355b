"""Export in the lab: looked through, marked, written; by messages, and from Python."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.jupyter.test_lab import RUN, Heard

from cloister import open_vault
from cloister.audit.notebook import Trail
from cloister.errors import SettingError
from cloister.settings import Settings
from cloister.vault.namespace import Kind

pytestmark = pytest.mark.slow

SAID = "Please call Ada Byron at 020 7946 0958 before noon."


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heard]:
    settings = Settings(
        home=tmp_path_factory.mktemp("home"), data=None, provider="keyfile")
    with pytest.MonkeyPatch.context() as patch, open_vault(
            settings=settings, create=True, notify=lambda notice: None) as vault:
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Heard(["nano-1"], vault=vault)
        with pytest.raises(SettingError, match="run something first"):
            made.results()
        with pytest.raises(SettingError, match="run something first"):
            made.export("a.csv")
        made.receive({**RUN, "prompt": SAID, "system": "redact"})
        made.answered()
        yield made
        made.close()


def told(lab: Heard, kind: str, **asked: Any) -> Any:
    """Send a message, and return the next of a kind."""
    before = len(lab.of(kind))
    lab.receive(asked)
    deadline = time.monotonic() + 120
    while len(lab.of(kind)) == before:
        assert time.monotonic() < deadline, [message["type"] for message in lab.sent]
        time.sleep(0.01)
    return lab.of(kind)[before]


def look(lab: Heard, **more: Any) -> dict[str, int]:
    values = told(lab, "results.values", type="results.look", source="run", **more)["values"]
    return {value["text"]: value["value"] for value in values}


def write(lab: Heard, path: Path, kind: str = "results.written", **more: Any) -> Any:
    return told(lab, kind, **{
        "type": "results.write", "source": "run", "path": str(path), "redact": True,
        "replace": False, "bom": False, **more})


def test_marks_are_taken_off_and_added_and_what_was_seen_is_written(
    lab: Heard, tmp_path: Path
) -> None:
    assert "run" in told(lab, "results.sources", type="results.sources")["sources"]
    numbers = look(lab)
    assert {"Ada Byron", "020 7946 0958"} <= set(numbers)
    assert lab.of("results.progress")[-1]["total"] >= 1
    texts = lab.of("results.texts")[-1]["texts"]
    assert ["Ada Byron", numbers["Ada Byron"]] in texts[1]["parts"]
    assert texts[1]["where"] == "prompt, row 1"
    assert "".join(part for part, _ in texts[1]["parts"]) == SAID
    told(lab, "results.values", type="results.switch", value=numbers["Ada Byron"], on=False)
    values = told(lab, "results.values", type="results.add", text=" NOON ")["values"]
    assert values[-1] == {"value": values[-1]["value"], "text": "NOON", "label": "[TEXT 1]",
                          "by": "you", "on": True, "count": 2}
    written = write(lab, tmp_path / "out.csv")
    text = (tmp_path / "out.csv").read_text("utf-8")
    assert written["path"] == str(tmp_path / "out.csv") and written["searched"] >= 2
    assert "Ada Byron" in text and "noon" not in text and "7946" not in text
    assert "exists already" in write(lab, tmp_path / "out.csv", "results.invalid")["message"]
    assert write(lab, tmp_path / "out.csv", replace=True, redact=False)["searched"] is None
    assert "7946" in (tmp_path / "out.csv").read_text("utf-8")


def test_runs_of_the_history_are_written(lab: Heard, tmp_path: Path) -> None:
    (line,) = told(lab, "history.lines", type="history.list")["lines"]
    written = write(lab, tmp_path / "a.html", source="history", places=[line["place"]],
                    redact=False)
    assert written["rows"] == 1 and SAID in (tmp_path / "a.html").read_text("utf-8")
    message = write(lab, tmp_path / "b.html", "results.invalid", source="history", places=[77],
                    redact=False)["message"]
    assert "no more" in message


def test_a_grid_is_written_and_what_it_asked_is_recorded(lab: Heard, tmp_path: Path) -> None:
    told(lab, "grid.table", type="grid.read", text="who,expected\nAda Byron of Quartz Lane,no\n")
    told(lab, "grid.over", type="grid.run", run="g", columns=["0"], name="g", form={
        "templates": "call {who} again and again today", "system": "redact", "check": "exact",
        "seeds": "", "temperature": 0.0, "max_tokens": 40, "wanted": 0.9})
    assert told(lab, "results.sources", type="results.sources")["sources"] == ["run", "grid"]
    (row,) = lab.results("grid")
    assert write(lab, tmp_path / "g.csv", source="grid", redact=False)["rows"] == 1
    assert "call Ada Byron of Quartz Lane again" in (tmp_path / "g.csv").read_text("utf-8")
    assert lab.space is not None
    known = Trail(lab.space, Kind.HISTORY)
    for text in (row["asked"], SAID):
        assert known.fingerprints.of(str(text)) <= known.known


def test_it_goes_from_python_too(lab: Heard, tmp_path: Path) -> None:
    written = lab.export(tmp_path / "a.parquet")
    assert written.replaced["NAME"] >= 1 and written.replaced["PHONE"] >= 1
    assert b"Byron" not in (tmp_path / "a.parquet").read_bytes()
    (row,) = lab.results()
    assert row["prompt"] == SAID and row["tier"] == "nano-1" and row["when"]


def test_looking_is_stopped_and_bad_messages_are_refused(lab: Heard, tmp_path: Path) -> None:
    panel = lab._panels["results"]
    for bad in ({"type": "results.x"}, {"type": "results.switch", "value": "zanzibar", "on": True}):
        lab.receive(bad)
        assert "zanzibar" not in lab.of("results.invalid")[-1]["message"]
    lab.receive({"type": "results.look", "source": "run"})
    lab.receive({"type": "results.stop"})
    deadline = time.monotonic() + 60
    while not lab.of("results.stopped"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for asked in ({"type": "results.add", "text": "x"}, {"type": "results.page", "number": 0}):
        assert "look for personal data first" in told(lab, "results.invalid", **asked)["message"]
    assert "look for" in write(lab, tmp_path / "a.csv", "results.invalid")["message"]
    look(lab)
    assert "no letter" in told(lab, "results.invalid", type="results.add", text="...")["message"]
    assert "choose less" in told(
        lab, "results.invalid", type="results.add", text="x" * 2000)["message"]
    assert "no name" in write(lab, Path(" "), "results.invalid")["message"]
    assert told(lab, "results.texts", type="results.page", number=99)["number"] == 0
    assert "Byron" not in repr(panel) + json.dumps(lab.get_state(), default=str)
