"""One command gives a tier two senses, from encoders that were trained to its bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tests.unit.reference import test_clips
from tests.unit.reference.test_clips import EAR, EYE, FORMATS
from tests.unit.reference.test_pictures import FACES, HAND

from cloister.bundle import Bundle
from cloister.model.checkpoint import Checkpoint
from cloister.model.sense_file import SenseKind
from cloister.quantize.apply import quantize
from cloister.reference import checkpoint_path, clips, comparison, ctc, fonts, senses
from cloister.reference.speech import RATE
from cloister.tiers import Tier

pytestmark = pytest.mark.slow

cache = test_clips.cache
TIER = Tier.NANO_1
VOCABULARY = 4096


def encoder(folder: Path, config: Any, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    ctc.write(ctc.CtcModel(config, "ab", VOCABULARY, seed), folder)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build leaves of a tier: weights, and the same in 4 bits."""
    folder = tmp_path_factory.mktemp("family")
    shutil.copytree(checkpoint_path(TIER), folder / "checkpoints" / TIER)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(checkpoint_path(TIER) / name, folder / name)
    (folder / "quantized").mkdir()
    quantize(folder / "checkpoints" / TIER, folder / "quantized" / TIER)
    return folder


@pytest.fixture
def given(
    cache: Path, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    people = tmp_path / "spoken_orders"
    people.mkdir()
    label, rng = {"intent": "orderDrink", "slots": {"size": "small"}}, np.random.default_rng(0)
    (people / "labels.json").write_text(json.dumps({"a.wav": label, "b.wav": label}))
    for name in ("a.wav", "b.wav"):
        soundfile.write(people / name, rng.normal(0, 0.1, 2 * RATE), RATE)
    monkeypatch.setattr(clips, "_MEASURED", 2)
    monkeypatch.setattr(comparison, "_LIMIT", 8)
    monkeypatch.setattr(senses.Mixture, "read", lambda _: test_clips.mixture())
    monkeypatch.setattr(fonts, "faces", lambda *_, **__: [*FACES, HAND])
    ears, eyes = encoder(tmp_path / "ears", EAR), encoder(tmp_path / "eyes", EYE)
    return ["--data", str(tmp_path), "--ears", str(ears), "--eyes", str(eyes), "--cache",
            str(cache), "--fonts", str(tmp_path), "--family", str(family), "--tiers", TIER,
            "--count", "32", "--steps", "2"]


def record(family: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((family / f"{TIER}.json").read_text())["senses"]
    return found


def test_one_command_gives_a_tier_two_senses_and_goes_on_where_it_stopped(
    given: list[str], family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    assert senses.main(given) == 0
    assert "nano-1.cloister is ready" in capsys.readouterr().err
    source = Checkpoint.open(family / "quantized" / TIER)
    made = Checkpoint.open(family / "multimodal" / TIER)
    assert made.metadata.media == FORMATS and made.metadata.parent == source.identity
    assert {kind: file.config.recipe for kind, file in made.senses.items()} == {
        SenseKind.VISION: "8da8w", SenseKind.AUDIO: "8da4w-g32"}
    plain = (family / "senses" / TIER / "audio.safetensors")
    assert not senses.SenseFile.open(plain).load().projector.correction.weight.any()
    bundle = Bundle.open(family / "multimodal" / f"{TIER}.cloister")
    bundle.verify()
    assert bundle.manifest.media == FORMATS
    names = {"orders by people", "orders by people, trimmed", "requests by voices never heard",
             "lines, clean", "lines, half worn", "lines, worn",
             *(f"{task} by camera, {name}" for task in ("redact", "call")
               for name in clips.CAMERA)}
    names |= {f"{name}, written" for name in senses._DIVIDED}
    assert set(bundle.receipt()["evaluations"]) == names
    before = record(family)
    assert set(before) == {"rounding", "evaluation", "bytes"}
    assert set(before["evaluation"]) == {"origin", "divided", *names}
    assert before["bytes"]["bundle"] > before["bytes"]["audio_encoder"] > 0
    assert str(tmp_path) not in json.dumps(before) and str(family) not in json.dumps(before)

    assert senses.main([*given, "--compare"]) == 0
    compared = record(family)["comparison"]
    assert compared["clips"] <= 32
    for way in ("labels", "few labels", "nothing learnt"):
        assert len(compared[f"requests by voices never heard, over {way}"]["before"]) == 3

    # Nothing is made again of the same, and all of another ear.
    with monkeypatch.context() as patch:
        patch.delattr(senses.pipeline, "export")
        patch.delattr(senses, "evaluate")
        assert senses.main(given) == 0
        assert {**record(family), "comparison": None} == {**before, "comparison": None}
    encoder(tmp_path / "ears", EAR, seed=1)
    assert senses.main(given) == 0
    after = record(family)
    assert after["rounding"]["origin"] != before["rounding"]["origin"]
    assert Bundle.open(bundle.path).manifest.parent != bundle.manifest.parent


@pytest.mark.parametrize(("change", "said"), [
    (["--tiers", "femto"], "femto"), (["--steps", "0"], "steps is 0"),
    (["--ears", "nowhere"], "nowhere")])
def test_wrong_usage_ends_in_one_sentence(
    given: list[str], change: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert senses.main([*given, *change]) == 1
    assert said in capsys.readouterr().err


def test_encoders_of_another_kind_or_of_other_tokens_are_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert senses.main([*given, "--ears", str(tmp_path / "eyes")]) == 1
    assert "EARS or EYES" in capsys.readouterr().err
    ctc.write(ctc.CtcModel(EAR, "ab", 300), tmp_path / "ears")
    assert senses.main(given) == 1
    assert "audio encoder finds 300 tokens" in capsys.readouterr().err
