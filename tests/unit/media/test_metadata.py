"""What a file says beside its pixels or samples stays in the process that decodes it."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import traceback
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import soundfile
from PIL import Image as Pillow
from PIL import PngImagePlugin
from tests.unit.media.files import RATE, formats, noise, saved, sine, sound

from cloister.audit.canary import Canary, search
from cloister.errors import CloisterError
from cloister.media import process, read
from cloister.parts import Audio, Image

CANARY = Canary("metadata", "a zephyr 5b160e3b1e406f39e in quartz")  # EXIF holds ASCII
TEXT = CANARY.text


def exif() -> Pillow.Exif:
    made = Pillow.Exif()
    made[0x0112], made[0x010E], made[0x013B] = 1, TEXT, TEXT  # orientation, description, artist
    made[0x8825] = {1: "N", 2: (48.0, 51.0, 29.9), 0x1B: TEXT.encode()}  # GPS
    made[0x8769] = {0x9286: b"ASCII\0\0\0" + TEXT.encode()}  # comment of the user
    return made


def picture(kind: str) -> bytes:
    """A file with the canary in every place that Pillow can write it to."""
    image = Pillow.fromarray(noise(32, 48))
    options: dict = {"exif": exif(), "icc_profile": TEXT.encode()}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", TEXT)
        info.add_itxt("XML:com.adobe.xmp", TEXT)
        info.add_text("Author", TEXT, zip=True)
        return saved(image, kind, pnginfo=info, **options)
    if kind == "JPEG":
        return saved(image, kind, comment=TEXT, xmp=TEXT.encode(), **options)
    return saved(image, kind, xmp=TEXT.encode(), lossless=True, **options)


def recording(kind: str) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, format=kind) as out:
        if kind != "MP3":
            out.title = out.artist = out.comment = TEXT
        out.write(sine())
    if kind != "MP3":
        return file.getvalue()
    frame = b"\0" + TEXT.encode()
    body = b"TIT2" + struct.pack(">I", len(frame)) + b"\0\0" + frame
    size = bytes(len(body) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + body + file.getvalue() + (b"TAG" + TEXT.encode()).ljust(128)[:128]


PLACES = {  # in the files, in clear: PNG packs its profile and one of its texts
    "PNG": 6, "JPEG": 7, "WEBP": 6, "WAV": 3, "FLAC": 3, "OGG": 3, "MP3": 2}
FILES = {
    **{kind: Image(data=picture(kind)) for kind in ("PNG", "JPEG", "WEBP")},
    **{kind: Audio(data=recording(kind)) for kind in ("WAV", "FLAC", "OGG", "MP3")},
}


def search_in(folder: Path, found: dict[str, bytes]) -> set[str]:
    """Names of what holds the canary, in any form."""
    for name, content in found.items():
        (folder / name).write_bytes(content)
    return {str(find.file) for find in search(folder, [CANARY])}


@pytest.mark.parametrize("kind", FILES)
def test_metadata_leaves_neither_with_what_is_read_nor_with_an_error_nor_beside_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, answers = tmp_path / "beside", list[bytes]()
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(
        PIPE=subprocess.PIPE, DEVNULL=beside.open("ab"), Popen=subprocess.Popen))
    unpack = process.Answer.unpack

    def listen(raw: bytes) -> process.Answer:
        answers.append(raw)
        return unpack(raw)

    monkeypatch.setattr(process, "Answer", SimpleNamespace(unpack=listen))
    part, errors = FILES[kind], list[str]()
    assert part.data.count(TEXT.encode()) == PLACES[kind]
    result = msgspec.msgpack.encode(read(part, formats()))
    assert len(result) > 1000
    for end in (len(part.data) // 2, len(part.data) - 1, 200):  # damaged, so that decoders complain
        cut = type(part)(data=part.data[:end])
        with contextlib.suppress(CloisterError):
            try:
                read(cut, formats())
            except CloisterError as error:
                errors += [repr(error), "".join(traceback.format_exception(error))]
                raise
    assert errors
    found = search_in(tmp_path, {
        "control": part.data, "result": result, "answers": b"".join(answers),
        "errors": "".join(errors).encode()})
    assert found == {"control"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_the_same_without_its_metadata(kind: str) -> None:
    data = FILES[kind].data
    bare = Pillow.open(io.BytesIO(data))
    assert {"exif", "icc_profile"} <= set(bare.info)  # what a plain reader has of it
    pixels = np.asarray(bare.convert("RGB"))
    assert read(FILES[kind], formats()) == read(Image.of(pixels), formats())


def test_what_decoders_say_aloud_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    """libmpg123 writes to the standard error by itself: the control."""
    twice = 2 * sound(sine(), "MP3")
    with soundfile.SoundFile(io.BytesIO(twice)) as file:
        file.read()
    assert "Warning" in capfd.readouterr().err
    with pytest.raises(CloisterError):
        read(Audio(data=twice), formats())
    assert capfd.readouterr() == ("", "")
