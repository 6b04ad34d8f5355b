"""Encoders and projectors are quantized for what they read, and the report says what that costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.unit.model import test_sense as tiny

from cloister.cli import main
from cloister.distill.schedule import Schedule
from cloister.errors import DataError, QuantizationError, SettingError
from cloister.example import Example
from cloister.model import sense_file
from cloister.model.checkpoint import Checkpoint
from cloister.model.encoder import EncoderBlock
from cloister.model.projector import ProjectorKind, ProjectorShape
from cloister.model.recipe import Recipe
from cloister.model.sense import SenseConfig, linears, scheme_of
from cloister.model.sense_file import SenseKind
from cloister.pieces import Fit
from cloister.quantize import encoders
from cloister.quantize.apply import QuantizeReport, quantize
from cloister.quantize.encoders import SenseOptions, quantize_sense
from cloister.quantize.train import QatSettings

# Bound by the width, not the depth: in 4 bits an input of 32 is one group.
WIDE = replace(tiny.RECORDINGS, encoder=replace(
    tiny.RECORDINGS.encoder, hidden_size=128, heads=4, feed_forward=256, layers=3))
CONVOLVING = replace(WIDE, encoder=replace(WIDE.encoder, kernel=5))
TOKENS = replace(tiny.RECORDINGS, projector=ProjectorShape(
    kind=ProjectorKind.TOKENS, size=24, vocabulary=50))


def recordings(count: int, seed: int = 1) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(1, 1, 1280 * (4 + at % 5), generator=rng) for at in range(count)]


def made(config: SenseConfig, path: Path) -> sense_file.SenseFile:
    """A sense whose norms stretch some channels, as those of trained ones do."""
    sense = tiny.sense(config)
    for block in sense.encoder.layers:
        assert isinstance(block, EncoderBlock)
        for norm in (block.attn_norm, block.mlp_norm):
            norm.weight.data[::7] *= 12
    for _, linear in linears(sense):
        linear.weight.data = torch.randn_like(linear.weight) / linear.in_features**0.5
    return sense_file.save(path, sense)


@pytest.mark.parametrize("config", [WIDE, CONVOLVING, tiny.PICTURES, TOKENS])
def test_every_linear_layer_is_quantized_and_nothing_else(
    tmp_path: Path, config: SenseConfig
) -> None:
    file = made(config, tmp_path / "plain.safetensors")
    media = [tiny.picture()] * 4 if config.mel is None else recordings(4)
    for number, given in enumerate(([], media)):
        out = tmp_path / f"{number}.safetensors"
        report = quantize_sense(file, out, "8da4w-g32", given=given)
        ours = sense_file.SenseFile.open(out)
        assert ours.config == replace(config, recipe="8da4w-g32")
        kept = {name for name, _ in linears(file.load())}
        assert {name.removesuffix(".weight.q") for name in sense_file.plan(ours.config)
                if name.endswith(".q")} == kept
        assert report.size_bytes == out.stat().st_size
        assert (report.error is None) == (not given)


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w-g32"])
def test_calibration_brings_the_vectors_nearer(tmp_path: Path, recipe: str) -> None:
    file, media = made(WIDE, tmp_path / "plain.safetensors"), recordings(12)
    by_itself = quantize_sense(file, tmp_path / "a.safetensors", recipe)
    calibrated = quantize_sense(file, tmp_path / "b.safetensors", recipe, given=media)
    assert (by_itself.error, by_itself.measured) == (None, 0)
    assert (calibrated.calibrated, calibrated.measured) == (9, 3)
    before = encoders.relative_error(
        sense_file.SenseFile.open(tmp_path / "a.safetensors").load(), file.load(), media[3::4])
    assert calibrated.error is not None
    assert 0 < calibrated.error < 0.9 * before < 0.5


@pytest.mark.parametrize("config", [WIDE, CONVOLVING])
@torch.no_grad()
def test_smoothing_changes_nothing_that_a_block_computes(
    tmp_path: Path, config: SenseConfig
) -> None:
    block = made(config, tmp_path / "plain.safetensors").load().encoder.layers[0]
    assert isinstance(block, EncoderBlock)
    x = torch.randn(2, 9, 128)
    before, inputs = block(x), {
        f"b.{name}": torch.rand(40, layer.in_features) * 5 for name, layer in linears(block)}
    weight = block.attn.q.weight.clone()
    encoders.smooth(block, "b", inputs)
    assert (block.attn.q.weight - weight).abs().max() > 0.01
    assert (block(x) - before).abs().max() < 1e-4


def test_a_matrix_that_no_group_divides_is_held_in_8_bits() -> None:
    recipe = Recipe.parse("8da4w-g32")
    assert scheme_of(recipe, "encoder.layers.0.mlp.down", 4304).bits == 8
    assert scheme_of(recipe, "encoder.layers.0.mlp.up", 1152).bits == 4
    assert scheme_of(recipe, "projector.head", 1152).bits == 8


def test_one_that_is_quantized_is_refused(tmp_path: Path) -> None:
    file = made(tiny.PICTURES, tmp_path / "plain.safetensors")
    quantize_sense(file, tmp_path / "once.safetensors")
    once = sense_file.SenseFile.open(tmp_path / "once.safetensors")
    with pytest.raises(QuantizationError, match="already"):
        quantize_sense(once, tmp_path / "twice.safetensors")


@pytest.fixture
def source(tmp_path: Path, tokenizer_dir: Path) -> Checkpoint:
    shape = replace(tiny.SHAPE, hidden_size=64, feed_forward=64, head_size=32)
    projectors: dict[str, Any] = {"size": 64}
    senses = tuple(
        (kind, replace(config, projector=replace(config.projector, **projectors)))
        for kind, config in ((SenseKind.VISION, tiny.PICTURES), (SenseKind.AUDIO, tiny.RECORDINGS)))
    return tiny.checkpoint(tmp_path / "plain", tokenizer_dir, shape=shape, senses=senses)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A data file that names recordings and a picture."""
    pytest.importorskip("soundfile")
    import soundfile
    from PIL import Image

    for number, samples in enumerate(recordings(5)):
        soundfile.write(tmp_path / f"{number}.wav", samples.flatten().numpy(), 16_000)
    Image.fromarray(tiny.picture()[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    lines = [{"task": "call", "input": "", "target": "x", "audio": f"{at}.wav"} for at in range(5)]
    lines.append({"task": "read", "input": "", "target": "x", "image": "a.png"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data.jsonl"


def test_a_checkpoint_is_quantized_with_its_senses(
    source: Checkpoint, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([
        "quantize", str(source.path), "-o", str(out), "--media", str(media), "--sense-recipe",
        "8da4w-g32", "--json"]) == 0
    said = {each["sense"]: each for each in json.loads(capsys.readouterr().out)["senses"]}
    assert (said["audio"]["calibrated"], said["audio"]["measured"]) == (4, 1)
    assert 0 < said["audio"]["error"] < 1 and said["vision"]["measured"] == 1
    quantized = Checkpoint.open(out)
    assert quantized.metadata.media == source.metadata.media
    assert {each.config.recipe for each in quantized.senses.values()} == {"8da4w-g32"}
    again = quantize(source, tmp_path / "default")
    assert isinstance(again.report, QuantizeReport)
    assert [each.recipe for each in again.report.senses] == ["8da8w", "8da8w"]


def test_each_line_of_a_note_is_calibrated_on(tmp_path: Path, tokenizer_dir: Path) -> None:
    pytest.importorskip("PIL")
    from tests.unit.media.test_note import written

    assert tiny.MEDIA.picture is not None
    lines = msgspec.structs.replace(
        tiny.MEDIA, picture=msgspec.structs.replace(tiny.MEDIA.picture, fit=Fit.LINE))
    source = tiny.checkpoint(tmp_path / "lines", tokenizer_dir, media=lines)
    written("call Ana", "buy milk", "and eggs").save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"task": "read", "input": "", "target": "x", "image": "a.png"}))
    found = encoders.media_of(source, tmp_path / "data.jsonl")[SenseKind.VISION]
    assert [each.shape for each in found] == [(1, 3, 32, 32)] * 3


def test_training_and_calibration_of_the_text_keep_the_senses(
    source: Checkpoint, tmp_path: Path
) -> None:
    texts = [Example(task="", input=f"what is {n} in Paris tomorrow", target="the quick brown fox")
             for n in range(200)]
    settings = QatSettings(schedule=Schedule(steps=1, tokens=64, micro=64, warmup=0))
    for name, options in (
        ("calibrated", {"calibrate": texts}),
        ("trained", {"calibrate": texts, "data": texts[:20], "settings": settings}),
    ):
        made = quantize(source, tmp_path / name, **options)
        assert made.metadata.media == source.metadata.media
        assert {each.config.recipe for each in made.senses.values()} == {"8da8w"}
        assert isinstance(made.report, QuantizeReport) and len(made.report.senses) == 2


def test_what_cannot_be_quantized_is_refused_before_anything_is_written(
    source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(SettingError):
        quantize(source, tmp_path / "out", senses=SenseOptions(recipe="3 bits"))
    with pytest.raises(DataError, match="no picture or recording"):
        quantize(source, tmp_path / "out", senses=SenseOptions(
            media=[Example(task="call", input="x", target="y")]))
    assert not (tmp_path / "out").exists()
