"""Runs in the vault: sealed, each with a key of its own, and gone when they are deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.jupyter.test_lab import RUN, Heard

from cloister import family, open_vault
from cloister.audit.canary import Canary, search
from cloister.audit.notebook import TEXT, Trail, check
from cloister.bundle import Bundle
from cloister.errors import SettingError, VaultDamaged
from cloister.settings import Settings
from cloister.tokenizer import Tokenizer
from cloister.vault.namespace import Kind
from cloister.vault.store import Vault
from cloister_jupyter import history as module
from cloister_jupyter.badge import badge
from cloister_jupyter.history import History, KeptAnswer, KeptRun, Line


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    settings = Settings(home=tmp_path / "home", data=None, provider="keyfile")
    with open_vault(settings=settings, create=True, notify=lambda notice: None) as made:
        yield made


def kept(number: int = 0, prompt: str = "remind me of the ferry", **more: Any) -> KeptRun:
    return KeptRun(
        run=f"run {number}", at_s=1e9 + number, prompt=prompt, system="call", sampling={"seed": 1},
        max_tokens=40, stopped=False, **{"answers": (
            KeptAnswer(tier="nano-1", text='{"name": "x"}', finish="end", tokens=5),
            KeptAnswer(tier="gone", text="", error="BundleError: there is none.")), **more})


def test_a_run_reads_as_it_was_kept_and_the_newest_stands_first(vault: Vault) -> None:
    history = History(vault.namespace())
    for number in (2, 0, 1):
        history.keep(kept(number, f"prompt {number} " + "x" * 100))
    lines = history.lines()
    assert [line.run for _, line in lines if isinstance(line, Line)] == ["run 2", "run 1", "run 0"]
    place, line = lines[0]
    assert isinstance(line, Line) and line.words == ("prompt 2 " + "x" * 100)[:80]
    assert line.tiers == ("nano-1", "gone")
    assert history.open(place) == kept(2, "prompt 2 " + "x" * 100)
    assert "prompt" not in repr(line) + repr(history.open(place)) + repr(lines)
    assert history.find("PROMPT nano-1 2") == [place] and history.find("ferry") == []


def test_one_is_deleted_alone_and_a_place_that_another_took_is_left(vault: Vault) -> None:
    history, space = History(vault.namespace()), vault.namespace()
    for number in range(3):
        history.keep(kept(number))
    keys = {place: space.identity(Kind.HISTORY, b"\xfflab run %d" % place) for place in range(3)}
    assert len({key[1] for key in keys.values() if key}) == 3
    assert history.forget([1], {1: "run 1"}) == 1
    with pytest.raises(SettingError, match="no more"):
        history.open(1)
    history.keep(kept(9))
    assert history.open(1).run == "run 9"
    assert history.forget([1, 0, 7], {1: "run 1", 0: "run 0"}) == 1
    assert [place for place, _ in history.lines()] == [1, 2]


def test_what_is_damaged_or_of_another_release_is_a_line_and_can_be_deleted(vault: Vault) -> None:
    history, space = History(vault.namespace()), vault.namespace()
    history.keep(kept(0))
    for place, record in ((1, b"{"), (2, b'{"format": 2, "prompt": "ferry"}'), (3, b"")):
        space.append(Kind.HISTORY, b"\xfflab run %d" % place, [record, record])
    lines = dict(history.lines())
    assert isinstance(lines[0], Line)
    assert "not as it was kept" in str(lines[1]) and "another release" in str(lines[2])
    assert all(str(lines[place]).endswith("delete it.") for place in (1, 2, 3))
    assert "ferry" not in str(lines[2])
    with pytest.raises(VaultDamaged, match="another release"):
        history.open(2)
    assert history.find("ferry") == [0]
    history.keep(kept(4))
    vault.db.rows("UPDATE records SET sealed = zeroblob(200) WHERE object = ?", space.identity(
        Kind.HISTORY, b"\xfflab run 4")[0])  # type: ignore[index]
    assert "is not what was written" in str(dict(history.lines())[4])
    assert history.forget([1, 2, 3, 4], {}) == 4
    assert [place for place, _ in history.lines()] == [0]


def test_too_many_or_too_large_is_refused_and_nothing_is_lost(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_RUNS", 2)
    monkeypatch.setattr(module, "RUN_BYTES", 2000)
    history = History(vault.namespace())
    with pytest.raises(SettingError, match="at most 2,000 are kept"):
        history.keep(kept(0, "x" * 3000))
    history.keep(kept(0))
    history.keep(kept(1))
    with pytest.raises(SettingError, match="delete some"):
        history.keep(kept(2))
    assert len(history.lines()) == 2


def waited(lab: Heard, kind: str) -> Any:
    deadline = time.monotonic() + 20
    while not lab.of(kind):
        assert time.monotonic() < deadline, [message["type"] for message in lab.sent]
        time.sleep(0.01)
    return lab.of(kind)[-1]


def test_a_run_is_in_no_file_in_the_vault_alone_and_gone_when_deleted(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Canaries in prompt, system prompt and answer; the vault unsealed is the control."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bundle = Bundle.open(family.bundle_path("nano-1"))
    tokenizer = Tokenizer.from_files(bundle.tokenizer_path, bundle.template_path)
    prompt, system = Canary.new("prompt"), Canary.new("system prompt")
    lab = Heard(["nano-1"], vault=vault, namespace="mine")
    try:
        lab.receive({**RUN, "prompt": prompt.text, "system": system.text})
        answer = Canary("answer", lab.answered())
        assert len(answer.text) > 12
        waited(lab, "history.kept")
        space, canaries = vault.namespace("mine"), [prompt, system, answer]
        assert search(tmp_path, canaries, tokenizer) == []
        control = tmp_path / "control"
        control.mkdir()
        (control / "unsealed").write_bytes(b"\n".join(space.everything()))
        assert {find.way for find in search(control, canaries, tokenizer)} == {
            "prompt", "system prompt", "answer"}
        (control / "unsealed").unlink()
        lab.receive({"type": "history.list"})
        (line,) = waited(lab, "history.lines")["lines"]
        lab.receive({"type": "history.open", "place": line["place"]})
        opened = waited(lab, "history.opened")
        assert (opened["prompt"], opened["system"]) == (prompt.text, system.text)
        assert opened["answers"][0]["text"] == answer.text
        lab.receive({"type": "history.forget", "runs": [[line["place"], line["run"]]]})
        waited(lab, "history.forgotten")
        lab.receive({"type": "history.open", "place": line["place"]})
        assert "no more" in waited(lab, "history.invalid")["message"]
        assert b"zephyr" not in b"\n".join(space.everything())  # fingerprints alone are left
        path = tmp_path / "a.ipynb"
        for text in (prompt.text, answer.text):
            path.write_text(json.dumps({"cells": [{"source": f"x = '''{text}'''"}]}))
            found = check(path, [Trail(space, Kind.HISTORY)]).findings
            assert TEXT in {each.kind for each in found}  # an answer may say a number besides
    finally:
        lab.close()


def test_the_switch_and_the_badge_say_whether_runs_are_kept(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    without = Heard(["nano-1"])
    without.receive({"type": "open"})
    assert "made without a vault" in without.of("history.state")[-1]["why"]
    without.receive({"type": "history.list"})
    assert "made without a vault" in without.of("history.invalid")[-1]["message"]
    assert "nothing kept" in without.of("badge")[-1]["summary"]
    assert badge({}).groups == badge({}, kept="").groups
    lab = Heard(["nano-1"], vault=vault)
    try:
        lab.receive({"type": "open"})
        assert lab.of("history.state")[-1]["keeping"] is True
        said = dict(lab.of("badge")[-1]["groups"][0][1])["prompts and answers"]
        assert "each run, sealed" in said
        lab.receive({"type": "history.keep", "on": False})
        said = dict(lab.of("badge")[-1]["groups"][0][1])["prompts and answers"]
        assert "off" in said and "fingerprints" in said
        lab.receive(RUN)
        lab.answered()
        lab.receive({"type": "history.list"})
        assert waited(lab, "history.lines")["lines"] == [] and not lab.of("history.kept")
        for bad in ({"type": "history.keep", "on": "zanzibar"}, {"type": "history.x"},
                    {"type": "history.open", "place": "zanzibar"}):
            lab.receive(bad)
            assert "zanzibar" not in lab.of("history.invalid")[-1]["message"]
    finally:
        lab.close()
        without.close()


def test_a_vault_that_fails_ends_no_run_and_is_told(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lab = Heard(["nano-1"], vault=vault)
    try:
        vault.close()
        lab.receive(RUN)
        assert lab.answered() and lab.of("over")
        told = {waited(lab, "history.problem")["message"] for _ in range(2)}
        assert told and all("zanzibar" not in words for words in told)
    finally:
        lab.close()
