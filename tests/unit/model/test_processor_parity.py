"""A file becomes the encoder's input that the model's own processor makes of it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
Pillow = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")

from tests.unit.model import multimodal_models as theirs  # noqa: E402

from cloister import media  # noqa: E402
from cloister.model.checkpoint import Checkpoint  # noqa: E402
from cloister.model.imports import import_model  # noqa: E402
from cloister.model.sense import Sense  # noqa: E402
from cloister.parts import Audio, Image, Picture, Recording  # noqa: E402


def photo(width: int, height: int) -> Pillow.Image:
    """Edges, gradients and noise."""
    x, y = torch.arange(width)[None, :], torch.arange(height)[:, None]
    rng = torch.Generator().manual_seed(width + height)
    colours = torch.stack((
        (x * 255 / width).expand(height, width), ((x // 5 + y // 7) % 2 * 255).float(),
        255 * torch.rand(height, width, generator=rng)), dim=2)
    return Pillow.fromarray(colours.to(torch.uint8).numpy())


def png(picture: Pillow.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def wav(samples: torch.Tensor) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.numpy(), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def pixels(sense: Sense, picture: Picture) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(picture.data), dtype=torch.uint8)
    return sense.front(raw.view(-1, 3, picture.height, picture.width))


def imported(layout: str, directory: Path) -> tuple[Checkpoint, Sense]:
    checkpoint = import_model(directory, directory / "ours")
    (_, file), = checkpoint.senses.items()
    return checkpoint, file.load()


@pytest.mark.parametrize("layout", ["gemma3", "smolvlm", "idefics3"])
def test_pixels_are_those_of_the_processor(layout: str, tmp_path: Path) -> None:
    _, processor = theirs.save(tmp_path, layout)
    checkpoint, sense = imported(layout, tmp_path)
    formats = checkpoint.metadata.media
    assert formats is not None
    for size in ((32, 32), (200, 150), (40, 90), (97, 31), (11, 7), (640, 480)):
        given = photo(*size)
        wanted = processor(images=given, return_tensors="pt")["pixel_values"]
        got = pixels(sense, media.read(Image(data=png(given)), formats))
        assert (got - wanted.view_as(got)).abs().max() <= 1e-4, size


def test_recordings_are_those_of_the_processor(tmp_path: Path) -> None:
    _, processor = theirs.save(tmp_path, "voxtral")
    checkpoint, sense = imported("voxtral", tmp_path)
    formats = checkpoint.metadata.media
    assert formats is not None and formats.recording is not None
    for seconds in (0.5, 2.0, 5.3):
        at = torch.arange(int(seconds * 16_000)) / 16_000
        given = 0.3 * (2 * math.pi * (200 + 100 * at) * at).sin() + 0.01 * torch.randn(len(at))
        wanted = processor(
            given.numpy(), sampling_rate=16_000, padding=True, truncation=False,
            pad_to_multiple_of=32_000, return_tensors="pt")["input_features"]
        recording = media.read(Audio(data=wav(given)), formats)
        assert isinstance(recording, Recording)
        samples = torch.frombuffer(bytearray(recording.data), dtype=torch.float32)
        whole = formats.recording.padded(len(samples))
        padded = torch.nn.functional.pad(samples, (0, whole - len(samples)))
        got = sense.front(padded.view(1, 1, -1))[:, 0]
        assert (got - wanted).abs().max() <= 1e-4, seconds
        vectors = sense(padded.view(1, 1, -1)).shape[1]
        assert formats.recording.layout(recording) == ["[BEGIN_AUDIO]", vectors]
