"""A recording becomes samples of one channel at the model's rate, whole, or is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit.media.files import RATE, formats, sine, sound

from cloister.errors import MediaTooLarge, MediaUnreadable
from cloister.media import Limits, process, read
from cloister.media.lengths import one_longer
from cloister.parts import Audio, Recording

EXACT = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"),
         ("FLAC", "PCM_16"), ("FLAC", "PCM_24")]


def array(recording: Recording) -> NDArray[np.float32]:
    return np.frombuffer(recording.data, np.float32)


def snr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Signal to noise in dB, the ends left out, where a filter has only one side."""
    found, expected = (each[len(each) // 10:-len(each) // 10] for each in (found, expected))
    return float(10 * np.log10((expected**2).sum() / ((found - expected)**2).sum()))


@pytest.mark.parametrize(("kind", "subtype"), EXACT)
def test_what_is_stored_without_loss_is_read_to_the_sample(kind: str, subtype: str) -> None:
    recording = read(Audio(data=sound(sine(), kind, subtype)), formats())
    assert recording.rate == RATE
    assert np.abs(array(recording) - sine()).max() < 2**-15


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_what_is_stored_with_loss_is_read_whole(kind: str, subtype: str | None) -> None:
    found = array(read(Audio(data=sound(sine(), kind, subtype)), formats()))
    assert len(found) == RATE
    assert snr(found, sine()) > 20


def test_a_file_is_read_as_what_it_is_whatever_its_name(tmp_path) -> None:
    (tmp_path / "speech.wav").write_bytes(sound(sine(), "MP3"))
    assert read(Audio.open(tmp_path / "speech.wav"), formats()).samples == RATE


@pytest.mark.parametrize("rate", [3000, 8000, 22050, 44100, 48000, 192000])
def test_the_rate_is_converted(rate: int) -> None:
    found = array(read(Audio(data=sound(sine(rate=rate), "WAV", "FLOAT", rate)), formats()))
    assert abs(len(found) - RATE) <= 1
    assert snr(found[:RATE], sine()[:len(found)]) > 80


def test_what_the_model_s_rate_cannot_hold_does_not_come_back_as_another_tone() -> None:
    high = sound(sine(rate=48000, hertz=11000), "WAV", "FLOAT", 48000)
    assert np.abs(array(read(Audio(data=high), formats()))[1000:-1000]).max() < 1e-4


def test_samples_in_memory_are_converted_without_a_process(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process, "decode", started)
    stereo = np.stack([sine(rate=48_000)] * 2, axis=1)
    assert len(array(read(Audio.of(stereo, rate=48_000), formats()))) == len(sine())
    with pytest.raises(MediaUnreadable, match="damaged"):
        read(Audio(data=b"\0\0\0", rate=RATE), formats())


def test_channels_are_mixed_by_their_mean() -> None:
    samples = np.stack([sine(hertz=100 * (channel + 1)) for channel in range(8)], axis=1)
    for audio in (Audio(data=sound(samples, "WAV", "FLOAT")), Audio.of(samples, rate=RATE)):
        found = array(read(audio, formats()))
        assert np.allclose(found, samples.mean(axis=1), atol=1e-6)


def test_samples_of_an_array_are_taken_as_they_are() -> None:
    assert np.array_equal(array(read(Audio.of(sine(), rate=RATE), formats())), sine())


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize("trim", [False, True])
def test_silence_and_a_constant_are_recordings_too(value: float, trim: bool) -> None:
    samples = np.full(RATE, value, np.float32)
    found = array(read(Audio.of(samples, rate=RATE, trim=trim), formats()))
    assert np.array_equal(found, samples)


def test_samples_a_little_beyond_full_scale_are_clipped() -> None:
    found = array(read(Audio.of(4 * sine(), rate=RATE), formats()))
    assert np.array_equal(found, (4 * sine()).clip(-1, 1))


LOUD = np.array([0, 20000, -20000] * 100, np.float32)
HOLED = {value: np.where(np.arange(300) == 250, np.float32(value), LOUD / 40000)
         for value in (np.nan, np.inf, -np.inf)}


@pytest.mark.parametrize("value", HOLED)
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    for audio in (Audio.of(HOLED[value], rate=RATE),
                  Audio(data=sound(HOLED[value], "WAV", "FLOAT"))):
        with pytest.raises(MediaUnreadable, match="no numbers"):
            read(audio, formats())


def test_samples_of_another_scale_are_refused() -> None:
    with pytest.raises(MediaUnreadable, match="far beyond -1 to 1"):
        read(Audio.of(LOUD, rate=RATE), formats())


@pytest.mark.parametrize("audio", [
    Audio(data=sound(sine(0))), Audio.of(np.zeros(0, np.float32), rate=RATE),
    Audio.of(np.zeros((0, 2), np.float32), rate=RATE)])
def test_a_recording_of_zero_length_is_refused(audio: Audio) -> None:
    with pytest.raises(MediaUnreadable, match="no samples"):
        read(audio, formats())


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_a_rate_that_no_sound_has_is_refused_with_the_number(rate: int) -> None:
    with pytest.raises(MediaUnreadable, match=f"has {rate} samples a second"):
        read(Audio.of(sine(), rate=rate), formats())


@pytest.mark.parametrize("data", [
    b"", b"\0", b"RIFF", bytes(1000), b"\xff" * 1000, b"%PDF-1.7\n" + bytes(100),
    sound(sine(), "AIFF"), sound(sine(), "AU"), sound(sine(), "CAF"), sound(sine(), "W64"),
    b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(100)])
def test_what_is_no_recording_of_a_known_format_is_refused(data: bytes) -> None:
    with pytest.raises(MediaUnreadable, match="no WAV, FLAC, Ogg or MP3"):
        read(Audio(data=data), formats())


def with_size(data: bytes, size: int) -> bytes:
    """A WAV whose header says that its samples take `size` bytes."""
    place = data.index(b"data") + 4
    return data[:place] + struct.pack("<I", size) + data[place + 4:]


WAV = sound(sine())
LIES = {
    "WAV, three times as long": with_size(WAV, 3 * len(WAV)),
    "WAV, half as long": with_size(WAV, RATE),
    "WAV, of no length": with_size(WAV, 0),
    "WAV, cut off": WAV[:len(WAV) // 2],
    "FLAC, one sample longer": one_longer(sound(sine(), "FLAC"), RATE - 2),
    "FLAC, twice as long": one_longer(sound(sine(), "FLAC"), RATE // 2 - 1),
    "FLAC, one sample shorter": one_longer(sound(sine(), "FLAC"), RATE),
    "FLAC, cut off": sound(sine(), "FLAC")[:8000],
    "Ogg, cut off": sound(sine(3), "OGG", "OPUS")[:-100],
    "Ogg, two in one": sound(sine(), "OGG") + sound(sine(rate=8000), "OGG", rate=8000),
    "MP3, cut off": sound(sine(3), "MP3")[:3000],
    "MP3, two in one": 2 * sound(sine(), "MP3"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_recording_of_another_length_than_it_says_is_refused(name: str) -> None:
    with pytest.raises(MediaUnreadable, match="damaged or ends early"):
        read(Audio(data=LIES[name]), formats())


@pytest.mark.parametrize("size", [2**32 - 1, 2**31 - 1])
def test_a_wav_that_was_begun_before_its_length_was_known_is_read_to_its_end(size: int) -> None:
    assert read(Audio(data=with_size(WAV, size)), formats()).samples == RATE


@pytest.mark.parametrize("behind", [
    b"", b"LIST\3\0\0\0abc\0", b"ID3\4" + bytes(range(100)), b"TAG".ljust(128, b"x"), bytes(600)])
def test_a_wav_may_have_more_than_its_samples(behind: bytes) -> None:
    assert read(Audio(data=WAV + behind), formats()).samples == RATE


def test_an_mp3_without_a_xing_header_is_not_cut_to_the_length_that_is_guessed() -> None:
    """Of a variable bit rate that begins low; the first frame is Xing's."""
    quiet, rng = np.zeros(RATE, np.float32), np.random.default_rng(0)
    samples = np.concatenate([quiet, 0.3 * rng.standard_normal(3 * RATE).astype(np.float32)])
    data = sound(samples, "MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    assert read(Audio(data=data), formats()).samples == len(samples)
    second = data.index(data[:2], 2)
    assert b"Xing" in data[:second]
    with pytest.raises(MediaUnreadable, match="damaged or ends early"):
        read(Audio(data=data[second:]), formats())


@pytest.mark.parametrize("samples", [1, 10, 4095, 4096, 4097, 40000])
def test_a_flac_of_any_length_is_read_whole(samples: int) -> None:
    flac = sound(np.resize(sine(), samples), "FLAC")
    assert read(Audio(data=flac), formats()).samples == samples


def test_an_mp3_between_tags_is_read() -> None:
    data = sound(sine(), "MP3")
    tagged = b"ID3\4\0\0\0\0\1\0" + bytes(128) + data + b"TAG" + bytes(125)
    assert read(Audio(data=tagged), formats()).samples == RATE


def test_a_recording_that_is_too_long_is_refused_with_both_numbers_and_never_cut() -> None:
    for audio in (Audio(data=sound(sine(1.5))), Audio.of(sine(1.5), rate=RATE),
                  Audio(data=sound(sine(1.5, 44100), rate=44100))):
        assert read(audio, formats(most_s=1.5)).samples == 24000
        with pytest.raises(MediaTooLarge, match=r"of 1\.50 s is longer than the 1\.25 s"):
            read(audio, formats(most_s=1.25))


def test_more_samples_than_are_decoded_are_refused_with_the_numbers() -> None:
    stereo = np.zeros((RATE, 2), np.float32)
    with pytest.raises(MediaTooLarge, match="32000 samples, and at most 31999"):
        read(Audio(data=sound(stereo)), formats(), limits=Limits(samples=31999))
    with pytest.raises(MediaTooLarge, match="160000 samples, and at most 100000"):
        read(Audio.of(sine(0.1, 160000), rate=1600), formats(most_s=100),
             limits=Limits(samples=100000))


def test_silence_is_trimmed_only_where_that_is_asked_and_before_the_length_is_judged() -> None:
    rng = np.random.default_rng(0)
    samples = 1e-4 * rng.standard_normal(6 * RATE).astype(np.float32)
    samples[2 * RATE:3 * RATE] += sine()
    with pytest.raises(MediaTooLarge):
        read(Audio.of(samples, rate=RATE), formats(most_s=2))
    trimmed = read(Audio.of(samples, rate=RATE, trim=True), formats(most_s=2))
    assert abs(trimmed.samples - 1.4 * RATE) < 0.05 * RATE
