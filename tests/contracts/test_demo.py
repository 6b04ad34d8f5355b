"""The demo goes the whole way, with the shipped family and with models that others made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.unit.model import gguf_files
from tests.unit.model.test_import import write

from cloister.bundle import Bundle
from cloister.cli import main
from cloister.commands import demo_model
from cloister.commands.demo import Demo, Sizes, demo

pytestmark = pytest.mark.slow


def test_the_demo_goes_the_whole_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In fewer steps, so that nothing is learnt."""
    bundle = tmp_path / "mine.cloister"
    found = demo(
        Demo(model=None, output=bundle, force=False),
        Sizes(examples=200, held_out=5, steps=2, steps_4bit=2, tokens=512))
    out, said = capfd.readouterr()
    assert "held-out cross-entropy" in said
    assert re.match(r"Five stages, about \d+ s on this machine", said)
    assert f"cloister run {bundle}" in out.partition("Next:")[2]
    Bundle.open(bundle).verify()
    made, *shipped = found["tiers"]
    assert made["tier"] == "nano-1, just made"
    assert made["answers"].count(None) == 17  # it was taught one task of six
    assert len(shipped) > 1
    assert not any(None in tier["answers"] for tier in shipped)
    assert len(found["measured"]) == 3
    assert all(0 <= each["top1"] <= 1 for each in found["measured"].values())


def test_a_file_that_others_made_goes_the_whole_way_and_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, bundle = tmp_path / "tiny.gguf", tmp_path / "mine.cloister"
    gguf_files.write(file, max_position_embeddings=256)
    found = demo(Demo(model=file, output=bundle, force=False))
    out, said = capfd.readouterr()
    assert re.match(r"Five stages, about \d+ (s|min) for \d+\.\d+ k weights on this machine", said)
    assert [line[:2] for line in re.findall(r"^\d\..*", said, re.MULTILINE)] == [
        f"{stage}." for stage in range(1, 6)]
    assert f"cloister chat {bundle}" in out.partition("Next:")[2]
    assert "demo --model" not in out  # it is kept already
    Bundle.open(bundle).verify()
    assert found["import"]["source"]["types"] == {"F32": 29}
    assert found["quantize"]["bits_per_parameter"] < 32
    assert {"mean_kld", "top1", "ppl_ratio"} <= found["measured"].keys()
    asked = found["bundle"]
    assert len(asked["answers"]) == len(found["answers_before"]) == len(found["prompts"])
    for key in ("bundle_bytes", "load_s", "decode_tokens_per_s", "peak_rss_bytes"):
        assert asked[key] > 0
    assert demo_model.PROMPTS[0] in out


def test_a_model_that_this_machine_has_goes_the_whole_way_by_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "one"
    snapshot.parent.mkdir(parents=True)
    write(snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--model", "org/tiny"]) == 0
    out, said = capfd.readouterr()
    assert "Traceback" not in said
    assert "cloister demo --model org/tiny -o mine.cloister" in " ".join(out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]  # nothing is left


def test_a_model_that_is_not_there_or_cannot_be_imported_costs_no_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").touch()
    odd = write(tmp_path / "odd", model_type="mamba", architectures=["MambaForCausalLM"])
    endless = write(tmp_path / "endless", eos_token_id=None)
    for model, output, sentence in (
        ("nobody/nothing", "x", "no model of that name"), (odd, "x", "MambaForCausalLM"),
        (write(tmp_path / "fine"), "kept", "is no bundle"), (endless, "x", "no token that ends"),
    ):
        out = tmp_path / output
        assert main(["demo", "--model", str(model), "-o", str(out), "--force"]) == 1
        said = capfd.readouterr().err
        assert sentence in said, said
        assert "Quantize" not in said
    assert not (tmp_path / "x").exists()
    assert (kept / "mine").exists()
