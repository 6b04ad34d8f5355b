"""Make samples of one channel at a format's rate of what a recording's file holds.

WAV, FLAC, Ogg (Vorbis, Opus) and MP3 are read by libsndfile, told by their first bytes. Channels
are mixed by their mean; the rate is converted by soxr in its high quality (HQ), as librosa does;
samples beyond -1 to 1 are clipped, as a sound card does, and refused far beyond, where their scale
is another one. A file that ends before its header says, or goes on behind it, is refused
(`lengths`).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from cloister.media import lengths
from cloister.media.exchange import Answer, Code, Refused
from cloister.media.silence import sound_span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from cloister.media.exchange import Request

    Samples = NDArray[np.float32]

__all__ = ["decode"]

_SIGNATURES = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"\xff")
_FORMATS = {"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"}  # libsndfile knows many more
_RATES = range(1000, 768_001)  # samples a second
_BLOCK = 1 << 18  # samples of all channels that are read at once
_NOT_RECOGNISED = 1  # libsndfile: SF_ERR_UNRECOGNISED_FORMAT
_LOUDEST = 16.0  # 24 dB above full scale


def decode(request: Request, data: bytes) -> Answer:
    """Return the samples of an answer, float32 from -1 to 1.

    Raises:
        Refused: the file is not decoded, and why.
    """
    format_ = request.recording
    assert format_ is not None
    if request.rate is None:
        rate, blocks = _opened(request, data)
    else:
        rate = request.rate
        values = np.frombuffer(data, np.float32).reshape(-1, request.channels)
        _check_length(*values.shape, rate, request)
        blocks = iter([values])
    samples_T = _mixed(blocks)
    if rate != format_.rate:
        samples_T = soxr.resample(samples_T, rate, format_.rate, quality="HQ")
    if request.trim:
        begin, end = sound_span(samples_T, format_.rate)
        samples_T = samples_T[begin:end]
    if not len(samples_T):
        raise Refused(Code.EMPTY)
    if len(samples_T) > format_.most:
        raise Refused(Code.LONG, len(samples_T))
    result = samples_T.clip(-1, 1).astype(np.float32).tobytes()
    if len(result) > request.limits.result_bytes:
        raise Refused(Code.RESULT, len(result))
    return Answer(code=Code.DONE, data=result)


def _opened(request: Request, data: bytes) -> tuple[int, Iterator[Samples]]:
    """Return the rate of a file, and its samples, float32[samples, channels] by and by."""
    if not data.startswith(_SIGNATURES):
        raise Refused(Code.UNKNOWN)
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        known = error.code != _NOT_RECOGNISED
        raise Refused(Code.DAMAGED if known else Code.UNKNOWN) from None
    if file.format not in _FORMATS:
        raise Refused(Code.UNKNOWN)
    if file.format in ("WAV", "WAVEX"):
        lengths.check_wav(data)
    elif file.format == "OGG":
        lengths.check_ogg(data)
    elif file.format == "MP3":
        lengths.check_mp3(data, file.frames)
    _check_length(file.frames, file.channels, file.samplerate, request)
    if file.format == "FLAC" and _goes_on(lengths.one_longer(data, file.frames), file.frames):
        raise Refused(Code.DAMAGED)
    return file.samplerate, _blocks(file)


def _goes_on(data: bytes, samples: int) -> bool:
    """Whether a FLAC, whose header says so, has a sample behind the first `samples`."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            file.seek(samples)
            return len(file.read(1)) > 0
    except soundfile.LibsndfileError:  # its end, which it does not find where the header says
        return False


def _check_length(samples: int, channels: int, rate: int, request: Request) -> None:
    """Refuse a recording by its header: `samples` a second and channel."""
    format_ = request.recording
    assert format_ is not None
    if rate not in _RATES:
        raise Refused(Code.RATE, rate)
    if samples < 1:
        raise Refused(Code.EMPTY)
    converted = samples * format_.rate // rate
    if converted > format_.most and not request.trim:
        raise Refused(Code.LONG, converted)
    if max(samples * channels, converted) > request.limits.samples:
        raise Refused(Code.SAMPLES, max(samples * channels, converted))


def _blocks(file: soundfile.SoundFile) -> Iterator[Samples]:
    left = file.frames
    most = max(1, _BLOCK // file.channels)
    while left:
        block = file.read(min(left, most), dtype="float32", always_2d=True)
        if not len(block):  # fewer than the header says
            raise Refused(Code.DAMAGED)
        left -= len(block)
        yield block


def _mixed(blocks: Iterator[Samples]) -> Samples:
    """Return the mean of the channels, float32[samples]."""
    mixed = []
    for block in blocks:
        if not np.isfinite(block).all():
            raise Refused(Code.NOT_FINITE)
        if np.abs(block).max(initial=0) > _LOUDEST:
            raise Refused(Code.LOUD)
        mixed.append(block.mean(axis=1, dtype=np.float32))
    return np.concatenate(mixed)
