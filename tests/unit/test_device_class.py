"""A bundle starts in what an app may take on a phone, or the check before loading says why not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from cloister import device_class, reference
from cloister.bundle import Bundle
from cloister.cli import main
from cloister.errors import DataError
from cloister.evaluate import limited
from cloister.runtime.program import runs_here
from cloister.settings import Settings
from cloister.tiers import DEVICES


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(reference.bundle_path("nano-1"), tmp_path / "n.cloister"))


def counts(bundle: Bundle, path: Path, **changed: object) -> Path:
    entry = bundle.manifest.programs[0]
    path.write_text(json.dumps({
        "program": bundle.manifest.files[entry.file].sha256, "emulator": "QEMU 7.2", "tokens": 31,
        "processors": {"cortex-a76": [1_262_294.5, 1_262_294.6]}, **changed}))
    return path


def test_counts_are_written_into_the_receipt_and_the_model_stays_the_same(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(device_class, "cold_start", lambda *_, **__: None)
    file, before = counts(bundle, tmp_path / "counts.json"), bundle.receipt()
    assert main(["bench", "--bundle", str(bundle.path), "--device-class", "--record",
                 "--instructions", str(file)]) == 0
    assert "cortex-a76, emulated: 1,262,295 instructions a token" in capsys.readouterr().out
    after = Bundle.open(bundle.path)
    found = after.receipt().pop("device_classes")
    assert isinstance(found, dict)
    assert found["instructions_per_token"]["processors"]["cortex-a76"]["repeats"] == 2
    assert [row["class"] for row in found["classes"]] == list(device_class.CLASSES)
    assert {**before, "device_classes": found} == after.receipt()
    entry = bundle.manifest.programs[0]
    assert after.model_id(entry) == bundle.model_id(entry)
    assert not any("_s" in name for name in found["instructions_per_token"])


@pytest.mark.parametrize(("changed", "complaint"), [
    ({"program": "0" * 64}, "another program"),
    ({"processors": {"a": [1e6, 1.0002e6]}}, "apart"),
    ({"processors": {"a": [1e6]}}, "two repeats"),
    ({"processors": {"a": [-1e6, 1e6]}}, "two repeats"),
    ({"seconds": 1.0}, "seconds"),
])
def test_counts_that_prove_nothing_are_refused(
    bundle: Bundle, tmp_path: Path, changed: dict[str, object], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        device_class.instructions(bundle, counts(bundle, tmp_path / "counts.json", **changed))
    with pytest.raises(DataError, match="cannot be read"):
        device_class.instructions(bundle, tmp_path / "none.json")


@pytest.mark.parametrize("arguments", [
    ("--shape", "nano-1", "--random", "--device-class"), ("--bundle", "nano-1", "--record"),
    ("--bundle", "nano-1", "--instructions", "x"),
])
def test_options_without_what_they_need_are_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert "--device-class" in capsys.readouterr().err


def test_a_bundle_too_large_for_a_phone_is_not_started(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = bundle.manifest.programs
    monkeypatch.setattr(bundle, "manifest", msgspec.structs.replace(
        bundle.manifest, programs=(msgspec.structs.replace(entry, kv_bytes=3 * 2**30),)))
    started = []
    monkeypatch.setattr(
        device_class, "cold_start", lambda _, limit, **__: started.append(limit))
    rows = device_class.measure(bundle, Settings.from_environment())["classes"]
    assert [row["runs"] for row in rows] == [False, False, None]
    assert re.search(r"takes 3\.\d\d GB and 2\.15 GB are available", rows[0]["why"])
    assert started == [DEVICES["phone 8 GB"]]


@pytest.mark.slow
def test_a_cold_start_under_a_limit_runs_or_the_check_before_loading_says_why_not(
    bundle: Bundle
) -> None:
    entry = bundle.program(runs_here)
    found = limited.cold_start(bundle.path, 2 * 2**30)
    if found is None:
        pytest.skip("no control group can be made here")
    assert found["runs"] is True
    assert isinstance(found["peak_bytes"], int)
    assert entry.weight_bytes < found["peak_bytes"] < 10**9
    # So much holds Python and torch; what the check asks for beside them is more than was taken.
    refused = limited.cold_start(bundle.path, found["peak_bytes"])
    assert refused is not None
    assert refused["runs"] is False
    assert "close other programs or take a smaller tier" in str(refused["why"])
    assert not [path for path in Path("/sys/fs/cgroup").glob("**/cloister-*") if path.is_dir()]
