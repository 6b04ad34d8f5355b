"""A picture and a recording that stand nowhere else, with a text in their metadata.

Standard library only: what is planted is made by other code than what reads it.
"""

from __future__ import annotations

import array
import io
import secrets
import struct
import wave
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.pieces import PictureFormat, RecordingFormat

__all__ = ["picture", "recording"]

_WINDOW_BYTES = 48


def picture(format_: PictureFormat, note: str) -> tuple[bytes, tuple[bytes, ...]]:
    """Return a PNG of the encoder's size with `note` in it, and what tells its content.

    That is part of the file as it is, and of its red pixels, which nothing changes where the
    format neither cuts pictures into tiles nor reads lines.
    """
    height, width = format_.height, format_.width
    pixels = secrets.token_bytes(height * width * 3)
    rows = b"".join(
        b"\0" + pixels[start:start + 3 * width] for start in range(0, len(pixels), 3 * width))
    packed = zlib.compress(rows, 1)
    file = b"\x89PNG\r\n\x1a\n" + b"".join((
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        _chunk(b"iTXt", b"Comment\0\0\0\0\0" + note.encode()),
        _chunk(b"IDAT", packed), _chunk(b"IEND", b"")))
    return file, (_middle(packed), _middle(pixels[::3]))


def recording(format_: RecordingFormat, note: str) -> tuple[bytes, tuple[bytes, ...]]:
    """Return a WAV at the encoder's rate with `note` in it, and what tells its content.

    That is part of the file's 16-bit samples, and of the same as float32.
    """
    samples = array.array("h", secrets.token_bytes(2 * format_.multiple))
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(format_.rate)
        file.writeframes(samples.tobytes())
    text = note.encode() + b"\0"
    text += bytes(len(text) % 2)
    info = b"INFOICMT" + struct.pack("<I", len(text)) + text
    riff = stream.getvalue()
    body = riff[8:] + b"LIST" + struct.pack("<I", len(info)) + info
    floats = array.array("f", (sample / 32768 for sample in samples))
    return b"RIFF" + struct.pack("<I", len(body)) + body, (
        _middle(samples.tobytes()), _middle(floats.tobytes()))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _middle(data: bytes) -> bytes:
    start = max(0, (len(data) - _WINDOW_BYTES) // 2)
    return data[start:start + _WINDOW_BYTES]
