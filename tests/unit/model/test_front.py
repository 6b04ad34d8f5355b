"""Pixels and mel spectra inside a program are those of the models' own processors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.export import Dim, export

transformers = pytest.importorskip("transformers")

from cloister.errors import SettingError  # noqa: E402
from cloister.model.front import Mel, MelShape, Pixels, PixelScale  # noqa: E402

RATE = 16_000


def recording(kind: str, seconds: float) -> torch.Tensor:
    at = torch.arange(int(seconds * RATE)) / RATE
    noise = torch.randn(len(at), generator=torch.Generator().manual_seed(3))
    return {
        "noise": 0.1 * noise, "silence": 0 * at,
        "tone, then silence": 0.5 * (2 * math.pi * 440 * at).sin() * (at < seconds / 3),
        "sweep": 0.3 * (2 * math.pi * 900 * at * at).sin() + 1e-3 * noise,
    }[kind]


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("kind", ["noise", "silence", "tone, then silence", "sweep"])
def test_mel_spectra_are_those_of_whisper(kind: str, bins: int) -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    given = recording(kind, 7.0)
    wanted = extractor(
        given.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"]  # of 30 s
    padded = torch.nn.functional.pad(given, (0, 30 * RATE - len(given)))
    got = Mel(MelShape(bins=bins))(padded.view(1, 1, -1))
    assert got.shape == (1, 1, bins, 3000)
    assert (got[:, 0] - wanted).abs().max() <= 1e-4


def test_an_exported_spectrum_reads_recordings_of_any_length() -> None:
    mel = Mel(MelShape(bins=40))
    program = export(
        mel, (recording("noise", 1.0).view(1, 1, -1),), strict=False,
        dynamic_shapes=({2: 160 * Dim("frames", min=4, max=1000)},)).module()
    for seconds in (0.04, 3.0, 10.0):
        given = recording("sweep", seconds).view(1, 1, -1)
        assert mel(given).shape[3] == round(100 * seconds)
        assert (program(given) - mel(given)).abs().max() <= 1e-4


def test_pixels_are_scaled_as_processors_do() -> None:
    processor = transformers.ViTImageProcessorPil(
        do_resize=False, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
    picture = torch.randint(
        256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wanted = processor(
        picture.numpy(), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    scale = PixelScale(mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225))
    assert (Pixels(scale)(picture[None]) - wanted).abs().max() <= 1e-6


def test_a_grey_encoder_reads_the_luma() -> None:
    grey = Pixels(PixelScale(mean=(0.0,), deviation=(1.0,)))
    picture = torch.tensor([255, 0, 0, 128, 128, 128], dtype=torch.uint8).view(1, 2, 3, 1)
    assert grey(picture.transpose(1, 2)).flatten().tolist() == pytest.approx([0.299, 128 / 255])


@pytest.mark.parametrize("change", [
    {"bins": 0}, {"window": 401}, {"hop": 201}, {"rate": 0}, {"window": 10**9},
])
def test_a_spectrum_out_of_bounds_is_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(change)) if "hop" not in change else "hops"):
        MelShape(**{"bins": 80, **change})


@pytest.mark.parametrize("change", [
    {"mean": (0.5, 0.5)}, {"mean": (0.5,)}, {"deviation": (0.5, 0.0, 0.5)},
    {"mean": (float("nan"), 0.0, 0.0)},
])
def test_a_scale_of_pixels_out_of_bounds_is_refused(change: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(SettingError):
        PixelScale(**change)
