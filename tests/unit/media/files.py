"""Pictures and recordings as files, and the formats that the tests read them with."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image as Pillow

from cloister.pieces import Fit, MediaFormats, PictureFormat, RecordingFormat, Resample, Tiles

RATE = 16000


def formats(
    height: int = 32, width: int = 48, fit: Fit = Fit.STRETCH,
    resample: Resample = Resample.BICUBIC, *, tiles: int | None = None, rate: int = RATE,
    most_s: float = 10, fill: tuple[int, int, int] = (255, 255, 255),
) -> MediaFormats:
    """Formats of a picture that may be cut into `tiles` of a longest edge, and of a recording."""
    cut = None if tiles is None else Tiles(longest_edge=tiles, before="", row_end="", whole="")
    return MediaFormats(
        picture=PictureFormat(
            height=height, width=width, tokens=1, fit=fit, resample=resample, tiles=cut, fill=fill),
        recording=RecordingFormat(
            rate=rate, samples_per_token=1, multiple=1, most=round(most_s * rate)))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Pixels uint8[height, width, channels] that no two filters make the same of."""
    made = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return made[..., 0] if channels == 1 else made


def saved(image: Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(
        ">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of the `kind` (0 grey, 2 colours, 3 palette) of unfiltered `rows`."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(
        b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sine(seconds: float = 1.0, rate: int = RATE, hertz: float = 440.0) -> NDArray[np.float32]:
    """Half of full scale, float32[samples]."""
    time_T = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time_T)).astype(np.float32)


def sound(
    samples: NDArray[np.float32], kind: str = "WAV", subtype: str | None = None, rate: int = RATE,
    **options: Any,
) -> bytes:
    file = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(file, "w", rate, channels, subtype, format=kind, **options) as out:
        out.write(samples)
    return file.getvalue()
