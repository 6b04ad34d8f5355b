"""Sealing: contexts, derived keys, wrapped keys, padded records (see FORMAT.md).

What was not made with the same key and context raises `InvalidTag`, here and nowhere else in the
vault; its callers know the place, and say it.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    Buffer = bytes | bytearray | memoryview

__all__ = [
    "KEY_BYTES", "PIECE_BYTES", "InvalidTag", "context", "derive", "mac", "new_key", "open_into",
    "open_record", "padded_bytes", "seal_parts", "seal_record", "sealed_bytes", "unwrap", "wrap",
]

KEY_BYTES = 32
_PREFIX = b"cloister-vault-1"
_HEADER_BYTES, _CHUNK_BYTES, _TAG_BYTES = 56, 16384, 16  # of Cobblestone-256
_LEAST_BYTES = 256  # of a padded record
PIECE_BYTES = 1 << 20  # bytes sealed or opened at a time: stays in the processor's cache

_EIGHT = (8).to_bytes(4, "big")

Field = bytes | str | int


def context(label: str, *fields: Field) -> bytes:
    """`C(label, fields...)` of FORMAT.md: no two lists of fields give the same bytes."""
    out = _PREFIX
    for field in (label, *fields):
        if isinstance(field, int):
            out += _EIGHT + field.to_bytes(8, "big")
        else:
            part = field.encode() if isinstance(field, str) else field
            out += len(part).to_bytes(4, "big") + part
    return out


def new_key() -> bytes:
    """A random key."""
    return os.urandom(KEY_BYTES)


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869), 32 bytes."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key)


def mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes."""
    return hmac.digest(key, message, "sha256")


def wrap(wrapping: bytes, key: bytes) -> bytes:
    """A key under another (AES-256 key wrap with padding, RFC 5649), 40 bytes."""
    return aes_key_wrap_with_padding(wrapping, key)


def unwrap(wrapping: bytes, wrapped: bytes) -> bytes:
    """What `wrap` wrapped.

    Raises:
        InvalidTag: it was wrapped under another key, or has changed.
    """
    try:
        key = aes_key_unwrap_with_padding(wrapping, wrapped)
    except (InvalidUnwrap, ValueError):
        raise InvalidTag from None
    if len(key) != KEY_BYTES:
        raise InvalidTag
    return key


def padded_bytes(size: int) -> int:
    """Length that a record of `size` bytes is padded to: at most 12 % more, above 256 bytes.

    Lengths that are left have few significant bits (Padme; FORMAT.md has the source), so that a
    length tells O(log log size) bits.
    """
    whole = size + 4
    if whole <= _LEAST_BYTES:
        return _LEAST_BYTES
    exponent = whole.bit_length() - 1
    low = exponent - exponent.bit_length()  # bits that must be zero
    return -(-whole >> low) << low


def seal_record(key: bytes, place: bytes, content: bytes) -> bytes:
    """A small record, padded and sealed under `key` for the context `place`."""
    sealer = Cobblestone256Encryptor(key, place)
    padded = len(content).to_bytes(4, "big") + content
    padded += bytes(padded_bytes(len(content)) - len(padded))
    return sealer.update(padded) + sealer.finalize()


def open_record(key: bytes, place: bytes, sealed: bytes) -> bytes:
    """What `seal_record` sealed.

    Raises:
        InvalidTag: sealed with another key or for another place, or changed.
    """
    opener = Cobblestone256Decryptor(key, place)
    padded = opener.update(sealed) + opener.finalize()
    size = int.from_bytes(padded[:4], "big")
    if len(padded) != padded_bytes(size):
        raise InvalidTag
    return padded[4:4 + size]


def sealed_bytes(size: int) -> int:
    """Length of `size` bytes after sealing."""
    return _HEADER_BYTES + size + _TAG_BYTES * (size // _CHUNK_BYTES + 1)


def seal_parts(key: bytes, place: bytes, parts: Iterable[Buffer]) -> Iterable[memoryview]:
    """The parts, one after the other, as one sealed message; each piece is valid until the next."""
    sealer = Cobblestone256Encryptor(key, place)
    buffer = memoryview(bytearray(sealed_bytes(PIECE_BYTES) + _CHUNK_BYTES))
    for part in parts:
        whole = memoryview(part).cast("B")
        for at in range(0, len(whole), PIECE_BYTES):
            yield buffer[:sealer.update_into(whole[at:at + PIECE_BYTES], buffer)]
    yield memoryview(sealer.finalize())


def open_into(key: bytes, place: bytes, pieces: Iterable[Buffer], target: memoryview) -> None:
    """Fill `target`, uint8, with the sealed message that `pieces` are, one after the other.

    Raises:
        InvalidTag: sealed with another key, for another place or of another length, or changed;
            `target` is zeroed.
    """
    opener = Cobblestone256Decryptor(key, place)
    done = 0
    try:
        for piece in pieces:
            room = target[done:]
            # A piece may give out a chunk that was held back before it, and less than it is long.
            if len(room) >= len(piece) + _CHUNK_BYTES:
                done += opener.update_into(piece, room)
            else:
                scratch = memoryview(bytearray(len(piece) + 2 * _CHUNK_BYTES))
                count = opener.update_into(piece, scratch)
                if count > len(room):
                    raise InvalidTag
                room[:count] = scratch[:count]
                done += count
        last = opener.finalize()
        if len(last) != len(target) - done:
            raise InvalidTag
        target[done:] = last
    except InvalidTag:
        # Chunks are given out before the last one is checked; none may be used.
        target[:] = bytes(len(target))
        raise
