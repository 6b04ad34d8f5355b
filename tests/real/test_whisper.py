"""The encoder of Whisper base comes in bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from tests.real import whisper

from cloister.model.encoder_import import import_encoder
from cloister.model.sense import Sense
from cloister.model.sense_file import SenseFile
from cloister.quantize.encoders import quantize_sense

pytestmark = pytest.mark.slow

RATE = 16_000


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> SenseFile:
    return import_encoder(whisper.path(), tmp_path_factory.mktemp("real") / "ear.safetensors")


@pytest.fixture(scope="module")
def ear(file: SenseFile) -> Sense:
    return file.load()


def voice(seconds: float = 30.0, base: float = 120.0) -> torch.Tensor:
    """Something like a voice: harmonics that glide and stop, in a little noise."""
    at = torch.arange(int(seconds * RATE)) / RATE
    pitch = 2 * math.pi * (base * at + 8 * (3 * at).sin())
    tones = sum((n * pitch).sin() / n for n in range(1, 20))
    loud = (2.5 * at).sin().clamp(min=0) * (at < 0.6 * seconds)
    noise = torch.randn(len(at), generator=torch.Generator().manual_seed(1))
    return (0.1 * loud * tones + 1e-3 * noise).view(1, 1, -1)


def test_the_file_is_that_of_whisper_base(file: SenseFile) -> None:
    shape = file.config.encoder
    assert (shape.layers, shape.hidden_size, shape.heads, shape.rows) == (6, 512, 8, 80)
    assert (shape.positions, shape.columns, file.config.samples_per_vector) == (1500, 3000, 320)
    assert file.path.stat().st_size < 42e6  # in the 16 bits that they came in


@torch.inference_mode()
def test_its_vectors_are_bit_for_bit_those_of_transformers(ear: Sense) -> None:
    mel = ear.front(voice())
    assert torch.equal(ear.encoder(mel), whisper.theirs()(mel[:, 0]).last_hidden_state)


@torch.inference_mode()
def test_of_the_waveform_they_are_those_of_its_processor(ear: Sense, tmp_path: Path) -> None:
    given = voice()
    extractor = transformers.WhisperFeatureExtractor()
    features = extractor(given.flatten().numpy(), sampling_rate=RATE, return_tensors="pt")
    wanted = whisper.theirs()(features["input_features"]).last_hidden_state
    assert (ear(given) - wanted).norm() / wanted.norm() <= 1e-4


@torch.inference_mode()
def test_a_short_recording_is_read_without_being_filled_up(ear: Sense) -> None:
    assert ear(voice(4.0)).shape == (1, 200, 512)


@pytest.mark.parametrize(("recipe", "bound"), [("8da8w", 0.08), ("8da4w-g32", 0.2)])
def test_in_8_and_4_bits_its_vectors_are_near(
    file: SenseFile, tmp_path: Path, recipe: str, bound: float
) -> None:
    media = [voice(4.0, base=80.0 + 20 * number) for number in range(8)]
    report = quantize_sense(file, tmp_path / "small.safetensors", recipe, given=media)
    print(f"Whisper base in {recipe}: vectors {report.error:.2%} off")
    assert report.error is not None and report.error < bound
