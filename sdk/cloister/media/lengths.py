"""Check that a sound file is as long as it says, before it is decoded.

libsndfile reads what a header promises, or what it guesses, and no more. Without this check, a file
that was cut off, the second of two Ogg files in one, and three quarters of an MP3 of variable bit
rate without a Xing header (libsndfile 1.2) would be lost without a word. A FLAC that is cut off
libsndfile refuses by itself.

Sources: RFC 3533 (Ogg pages), RFC 9639 (FLAC), ISO 11172-3 and 13818-3 (MPEG audio frames), the
structure of ID3v2.
"""

from __future__ import annotations

import struct

from cloister.media.exchange import Code, Refused

__all__ = ["check_mp3", "check_ogg", "check_wav", "one_longer"]

_ENDLESS = 0x7FFF_F000  # from here on a WAV says that its length was not known when it was begun
_TAGS = (b"ID3", b"TAG", b"APETAGEX")  # which some programs append
_SLACK = 4  # MPEG frames: one of Xing, the encoder's delay and padding
_BITRATES = {  # 1000 bits a second, layer III, by version
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_VERSIONS = {3: (1, 1), 2: (2, 2), 0: (2, 4)}  # by two bits: tables, and divisor of the rate
_RATES = (44100, 48000, 32000)
_COUNT_AT, _COUNT_BITS = 18, 36  # of a FLAC's samples: the lower bits of 8 bytes
_BEGINS, _ENDS = 2, 4  # flags of an Ogg page: first and last of a stream


def check_wav(data: bytes) -> None:
    """Refuse a WAV whose samples end before its header says, or go on behind that."""
    place, found = 12, False
    while place + 8 <= len(data) and not data.startswith(_TAGS, place):
        name, size = data[place:place + 4], struct.unpack_from("<I", data, place + 4)[0]
        if not all(0x20 <= letter < 0x7F for letter in name):  # no chunk begins here
            if found and any(data[place:]):
                raise Refused(Code.DAMAGED)
            return
        place += 8 + size
        if name == b"data":
            found = True
            if size >= _ENDLESS:
                return
            if place > len(data):
                raise Refused(Code.DAMAGED)
        place += size % 2


def check_ogg(data: bytes) -> None:
    """Refuse an Ogg file that ends before its last page, or holds one stream after another."""
    place, flags, begun = 0, 0, False
    while place + 27 <= len(data) and data[place:place + 4] == b"OggS":
        flags, segments = data[place + 5], data[place + 26]
        if begun and flags & _BEGINS:
            raise Refused(Code.DAMAGED)
        begun = begun or not flags & _BEGINS
        place += 27 + segments + sum(data[place + 27:place + 27 + segments])
    if place > len(data) or not flags & _ENDS:
        raise Refused(Code.DAMAGED)


def check_mp3(data: bytes, samples: int) -> None:
    """Refuse an MP3 that has other than about `samples` samples a channel."""
    place = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        place = 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])
    found = each = 0
    while 0 <= place < len(data) - 4:
        size, held = _mpeg_frame(data, place)
        if not size:
            place = data.find(b"\xff", place + 1)
            continue
        if place + size <= len(data):
            found, each = found + held, held
        place += size
    if abs(found - samples) > _SLACK * each:
        raise Refused(Code.DAMAGED)


def one_longer(data: bytes, samples: int) -> bytes:
    """Return a FLAC whose header names one sample more than `samples`."""
    place = data.index(b"fLaC") + _COUNT_AT
    head = int.from_bytes(data[place:place + 8], "big") >> _COUNT_BITS << _COUNT_BITS
    return data[:place] + (head | samples + 1).to_bytes(8, "big") + data[place + 8:]


def _mpeg_frame(data: bytes, place: int) -> tuple[int, int]:
    """Return the bytes and the samples of the layer III frame there; (0, 0) where none begins."""
    first, second, third = data[place:place + 3]
    version = _VERSIONS.get(second >> 3 & 3)
    if first != 0xFF or second & 0xE0 != 0xE0 or second >> 1 & 3 != 1 or version is None:
        return 0, 0
    table, divisor = version
    rate, bitrate = third >> 2 & 3, third >> 4
    if rate == 3 or bitrate in (0, 15):
        return 0, 0
    samples = 1152 // table
    size = samples // 8 * _BITRATES[table][bitrate] * 1000 // (_RATES[rate] // divisor)
    return size + (third >> 1 & 1), samples
