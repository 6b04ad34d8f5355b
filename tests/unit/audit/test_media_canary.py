"""Planted pictures and recordings are decoded as they were made, without their metadata."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.runtime.conftest import MEDIA

from cloister import media
from cloister.audit.canary import Canary, search
from cloister.audit.media_canary import picture, recording
from cloister.parts import Audio, Image
from cloister.pieces import Fit, MediaFormats, PictureFormat, RecordingFormat, Resample

NOTE = "a most private place \u00e9 \U0001f426"
FORMATS = MediaFormats(
    picture=PictureFormat(
        height=32, width=48, tokens=4, fit=Fit.STRETCH, resample=Resample.BICUBIC),
    recording=RecordingFormat(rate=16000, samples_per_token=1000, multiple=2000, most=8000))


@pytest.mark.parametrize("formats", [FORMATS, MEDIA.__class__(picture=MEDIA.picture)])
def test_a_planted_picture_keeps_its_pixels_and_loses_its_metadata(formats: MediaFormats) -> None:
    assert formats.picture is not None
    file, (packed, pixels) = picture(formats.picture, NOTE)
    read = media.read(Image(data=file), formats)
    assert packed in file
    assert NOTE.encode() in file
    assert pixels in read.data
    assert NOTE.encode() not in read.data


def test_a_planted_recording_keeps_its_samples_and_loses_its_metadata() -> None:
    assert FORMATS.recording is not None
    file, (samples, floats) = recording(FORMATS.recording, NOTE)
    read = media.read(Audio(data=file), FORMATS)
    assert samples in file
    assert NOTE.encode() in file
    assert floats in read.data
    assert read.samples == 2000


def test_planted_bytes_are_found_in_every_form_and_no_other_file(tmp_path: Path) -> None:
    assert FORMATS.recording is not None
    file, data = recording(FORMATS.recording, NOTE)
    canary = Canary(way="recording", text="", data=data)
    (tmp_path / "file").write_bytes(b"before" + file)
    (tmp_path / "hex").write_text(file.hex())
    (tmp_path / "other").write_bytes(recording(FORMATS.recording, NOTE)[0])
    assert {(str(find.file), find.form) for find in search(tmp_path, [canary])} == {
        ("file", "bytes"), ("hex", "hexadecimal")}
