"""A sense gives a decoder's vectors, and its file, in a checkpoint or alone, the same sense."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloister.errors import CheckpointError, SettingError, TensorMismatch
from cloister.model import sense_file
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import MelShape, PixelScale
from cloister.model.projector import ProjectorKind, ProjectorShape
from cloister.model.sense import Sense, SenseConfig
from cloister.model.sense_file import SenseFile, SenseKind
from cloister.model.transformer import Decoder
from cloister.model.writer import CheckpointWriter
from cloister.pieces import Fit, MediaFormats, PictureFormat, RecordingFormat, Resample
from cloister.tiers import Shape

SIZES: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 4, "feed_forward": 64}
PICTURES = SenseConfig(
    encoder=EncoderShape(
        stem=Stem.PATCHES, rows=32, channels=3, patch=8, positions=16, **SIZES),
    projector=ProjectorShape(kind=ProjectorKind.SHUFFLE, size=24, factor=2), pixels=PixelScale())
RECORDINGS = SenseConfig(
    encoder=EncoderShape(stem=Stem.CONVOLUTIONS_1D, rows=20, positions=48, **SIZES),
    projector=ProjectorShape(kind=ProjectorKind.STACK, size=24, factor=4),
    mel=MelShape(bins=20))
MEDIA = MediaFormats(
    picture=PictureFormat(
        height=32, width=32, tokens=4, fit=Fit.STRETCH, resample=Resample.BILINEAR),
    recording=RecordingFormat(rate=16_000, samples_per_token=1280, multiple=1280, most=15360))
SHAPE = Shape(
    vocab_size=300, hidden_size=24, layers=1, heads=2, kv_heads=1, head_size=12, feed_forward=32,
    context=64, tied=True)


def sense(config: SenseConfig) -> Sense:
    torch.manual_seed(1)
    made = Sense(replace(config, recipe=None))
    made.encoder.initialize(2)
    return made.eval()


def picture(count: int = 1) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)


def recording(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(1, 1, samples)


def checkpoint(path: Path, tokenizer_dir: Path, **changes: Any) -> Checkpoint:
    """A text model with both senses, but for `changes` of what its configuration says."""
    decoder = Decoder(ModelConfig(shape=changes.pop("shape", SHAPE)))
    decoder.initialize(0)
    values = decoder.state_dict()
    senses = changes.pop("senses", (
        (SenseKind.VISION, PICTURES), (SenseKind.AUDIO, RECORDINGS)))
    with CheckpointWriter(
        path, tensors=plan(decoder.config, None), template=None,
        metadata=Metadata(**{
            "name": "tiny", "config": decoder.config, "eos": (0,), "media": MEDIA, **changes}),
        tokenizer=tokenizer_dir / "tokenizer.json",
    ).with_senses({
        kind: partial(
            sense_file.write, config=config, tensors=sense(config).state_dict().items())
        for kind, config in senses
    }) as writer:
        for name in plan(decoder.config, None):
            writer.add(name, values[name])
    return Checkpoint.open(path)


@torch.no_grad()
def test_a_sense_gives_as_many_vectors_as_its_configuration_counts() -> None:
    eye, ear = sense(PICTURES), sense(RECORDINGS)
    assert eye(picture(2)).shape == (2, PICTURES.vectors, PICTURES.size) == (2, 4, 24)
    assert RECORDINGS.samples_per_vector == 1280
    assert ear(recording(1280 * 5)).shape == (1, 5, 24)
    assert ear(recording(1280 * RECORDINGS.vectors)).shape == (1, 12, 24)
    with pytest.raises(RuntimeError):
        ear(recording(1280 * 13))


@torch.no_grad()
def test_pieces_of_a_long_recording_are_encoded_each_by_itself() -> None:
    ear = sense(replace(RECORDINGS, pieces=True))
    one, two = recording(15360), recording(15360)
    both = ear(torch.cat((one, two), dim=2))
    assert both.shape == (1, 24, 24)
    assert (both[:, :10] - ear(one)[:, :10]).abs().max() < 0.05  # but for the seam's frames
    assert (both[:, 14:] - ear(two)[:, 2:]).abs().max() < 0.05


@pytest.mark.parametrize("config", [PICTURES, RECORDINGS, replace(PICTURES, projector=None)])
@torch.no_grad()
def test_the_file_of_a_sense_reads_back_as_the_same(tmp_path: Path, config: SenseConfig) -> None:
    made, path = sense(config), tmp_path / "any name.safetensors"
    file = sense_file.save(path, made)
    assert file.config == config
    given = picture() if config.mel is None else recording(12800)
    assert torch.equal(file.load()(given), made(given))
    again = sense_file.save(tmp_path / "other.safetensors", made)
    assert again.identity == file.identity


def test_a_checkpoint_has_its_senses_and_says_how_they_are_used(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    made = checkpoint(tmp_path / "both", tokenizer_dir)
    assert {kind: each.config for kind, each in made.senses.items()} == {
        SenseKind.VISION: PICTURES, SenseKind.AUDIO: RECORDINGS}
    assert made.metadata.media == MEDIA
    text = checkpoint(tmp_path / "text", tokenizer_dir, senses=(), media=None)
    assert text.senses == {} and "media" not in (text.path / "config.json").read_text()
    assert text.identity != made.identity


@pytest.mark.parametrize(("change", "complaint"), [
    ({"media": None}, "not both"),
    ({"senses": ((SenseKind.VISION, PICTURES),)}, "not both"),
    ({"media": MediaFormats(picture=MEDIA.picture, recording=RecordingFormat(
        rate=8000, samples_per_token=1280, multiple=1280, most=15360))}, "config.json says"),
    ({"media": MediaFormats(picture=MEDIA.picture, recording=RecordingFormat(
        rate=16000, samples_per_token=1280, multiple=1280, most=16640))}, "config.json says"),
    ({"senses": ((SenseKind.VISION, replace(PICTURES, projector=None)),
                 (SenseKind.AUDIO, RECORDINGS))}, "config.json says"),
])
def test_a_sense_that_does_not_fit_its_checkpoint_is_refused(
    tmp_path: Path, tokenizer_dir: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint(tmp_path / "odd", tokenizer_dir, **change)


def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    good = sense_file.save(tmp_path / "good.safetensors", sense(PICTURES)).path
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(good), foreign)
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(good.read_bytes().replace(b'layers\\": 2', b'layers\\": 1'))
    later = tmp_path / "later.safetensors"
    later.write_bytes(good.read_bytes().replace(b'format\\": 1', b'format\\": 2'))
    for path, error, complaint in (
        (cut, CheckpointError, "damaged"), (foreign, CheckpointError, "no sense"),
        (odd, TensorMismatch, "layers.1"), (later, CheckpointError, "format 1"),
        (tmp_path / "none.safetensors", CheckpointError, "damaged"),
    ):
        with pytest.raises(error, match=complaint):
            SenseFile.open(path)


@pytest.mark.parametrize("change", [
    {"pixels": None}, {"mel": MelShape(bins=32)},
    {"pixels": PixelScale(mean=(0.0,), deviation=(1.0,))},
    {"projector": ProjectorShape(kind=ProjectorKind.POOL, size=24, factor=3)}, {"pieces": True},
    {"recipe": "3 bits"},
])
def test_parts_that_do_not_fit_one_another_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        replace(PICTURES, **change)
