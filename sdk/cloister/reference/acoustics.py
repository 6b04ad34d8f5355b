"""Recordings out of clean speech: speed, a room, noise, a microphone, and silence around it.

Shapes: N samples at 16 kHz, float32 between -1 and 1. Everything is drawn from the generator that
is passed: the same one gives the same samples.

Silence is the trap: people press a button, wait, speak and wait again, so an encoder that has not
heard seconds of silence hears words in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import soxr

from cloister.errors import SettingError
from cloister.reference.speech import RATE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = ["NOISES", "at_speed", "noise", "record", "room"]

_ROOM = 0.45  # share of the recordings in which one hears the room
_CLICKS = 0.3
_CLIPPED = 0.04
_BAND = 0.35  # share of microphones that cut high frequencies


def at_speed(speech_N: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Return speech that is `factor` times as fast and as high, as of a smaller speaker."""
    if factor == 1.0:
        return speech_N
    return np.asarray(soxr.resample(speech_N, RATE * factor, RATE, quality="MQ"), np.float32)


def record(
    speech_N: NDArray[np.float32], length: int, rng: np.random.Generator, *,
    others: Sequence[NDArray[np.float32]] = (), before: int | None = None,
) -> NDArray[np.float32]:
    """Return a recording of `length` samples of the speech, somewhere in it.

    `others` is speech of which there may be babble in the background; `before` are the samples
    that the speech begins after, drawn if it is None.

    Raises:
        SettingError: the speech does not fit.
    """
    slack = length - len(speech_N)
    if slack < (before or 0):
        raise SettingError(
            f"Speech of {len(speech_N)} samples after {before or 0} does not fit into {length}; "
            "make the recording longer.")
    at = int(rng.integers(slack + 1)) if before is None else before
    level = float(np.exp(rng.normal(np.log(0.3), 0.6)))  # of the loudest sample
    whole_N = np.zeros(length, np.float32)
    whole_N[at:at + len(speech_N)] = speech_N * (level / max(1e-6, float(np.abs(speech_N).max())))
    if rng.random() < _ROOM:
        whole_N = room(whole_N, rng)
    loudness = float(np.sqrt(np.mean(np.square(whole_N[at:at + len(speech_N)]))))
    whole_N += _background(length, loudness, rng, others)
    if rng.random() < _CLICKS:
        whole_N += _clicks(length, loudness, rng)
    return _microphone(whole_N, rng)


def room(whole_N: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return what is heard in a room: early echoes, and noise that dies away by 60 dB."""
    seconds = float(rng.uniform(0.12, 0.7))
    count = int(seconds * RATE)
    decay = 10.0 ** (-3.0 * np.arange(count, dtype=np.float32) / count)
    response = rng.standard_normal(count, np.float32) * decay
    response[:int(0.004 * RATE)] = 0.0  # nothing comes before the nearest wall's echo
    response *= np.float32(10.0 ** (rng.uniform(-18.0, 3.0) / 20) / np.linalg.norm(response))
    echoes = rng.integers(int(0.001 * RATE), int(0.03 * RATE), 6)
    response[echoes] += rng.uniform(-0.4, 0.4, 6).astype(np.float32)
    response[0] = 1.0
    size = _fast(len(whole_N) + count)
    spectrum = np.fft.rfft(whole_N, size) * np.fft.rfft(response, size)
    return _scaled(np.fft.irfft(spectrum, size)[:len(whole_N)], float(np.abs(whole_N).max()))


def noise(
    kind: str, length: int, rng: np.random.Generator, others: Sequence[NDArray[np.float32]] = (),
) -> NDArray[np.float32]:
    """Return noise of one of the `NOISES`, with a mean square of 1.

    Raises:
        SettingError: there is no such noise.
    """
    if kind not in NOISES:
        raise SettingError(f"Noise {kind} is not known; use {', '.join(NOISES)}.")
    made_N = NOISES[kind](length, rng, others)
    loudness = float(np.sqrt(np.mean(np.square(made_N))))
    return np.asarray(made_N / np.float32(loudness + 1e-6), np.float32)


def _white(
    length: int, rng: np.random.Generator, _: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    return rng.standard_normal(length, np.float32)


def _coloured(
    length: int, rng: np.random.Generator, _: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return noise that falls with frequency, from nearly white to brown."""
    size = _fast(length)
    spectrum = np.fft.rfft(rng.standard_normal(size, np.float32))
    spectrum *= np.arange(1, len(spectrum) + 1, dtype=np.float32) ** -np.float32(
        rng.uniform(0.2, 1.2))
    return np.asarray(np.fft.irfft(spectrum, size)[:length], np.float32)


def _hum(
    length: int, rng: np.random.Generator, _: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return the mains and its harmonics, as of a refrigerator or a fan."""
    base = rng.choice([50.0, 60.0, rng.uniform(80.0, 240.0)])
    seconds = np.arange(length, dtype=np.float32) / RATE
    made_N = 0.05 * rng.standard_normal(length, np.float32)
    for harmonic in range(1, 7):
        made_N += np.float32(rng.uniform(0.0, 1.0) / harmonic) * np.sin(
            np.float32(2 * np.pi * base * harmonic) * seconds + np.float32(rng.uniform(0.0, 6.28)))
    return made_N


def _babble(
    length: int, rng: np.random.Generator, others: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return several voices at once, far away; coloured noise where there are none."""
    if not others:
        return _coloured(length, rng, others)
    made_N = np.zeros(length, np.float32)
    for _ in range(int(rng.integers(3, 8))):
        other = others[int(rng.integers(len(others)))]
        voice_N = np.resize(np.roll(other, int(rng.integers(len(other)))), length)
        made_N += np.float32(rng.uniform(0.2, 1.0)) * voice_N
    return made_N


def _cafe(
    length: int, rng: np.random.Generator, others: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return babble in a room, a machine, and cups that clink."""
    made_N = room(_babble(length, rng, others), rng)
    made_N = made_N / np.float32(np.sqrt(np.mean(np.square(made_N)) + 1e-12))
    machine_N = _coloured(length, rng, others)
    made_N += np.float32(rng.uniform(0.2, 0.8)) * machine_N / np.float32(machine_N.std() + 1e-6)
    for _ in range(int(rng.integers(0, 5))):
        count = min(length, int(rng.uniform(0.05, 0.4) * RATE))
        at = int(rng.integers(length - count + 1))
        seconds = np.arange(count, dtype=np.float32) / RATE
        made_N[at:at + count] += np.float32(rng.uniform(0.5, 4.0)) * np.exp(
            seconds * np.float32(-rng.uniform(10.0, 60.0))) * np.sin(
            np.float32(2 * np.pi * rng.uniform(1500.0, 6000.0)) * seconds)
    return made_N


NOISES: dict[str, Callable[
    [int, np.random.Generator, Sequence[NDArray[np.float32]]], NDArray[np.float32]]] = {
    "white": _white, "coloured": _coloured, "hum": _hum, "babble": _babble, "cafe": _cafe,
}


def _background(
    length: int, loudness: float, rng: np.random.Generator, others: Sequence[NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Return a background: mostly that of a quiet room, else a noise beneath the speech."""
    draw = rng.random()
    if draw < 0.08:
        return np.zeros(length, np.float32)  # a recorder that mutes what is quiet
    if draw < 0.6:
        made_N = noise("white" if rng.random() < 0.3 else "coloured", length, rng)
        return made_N * np.float32(10.0 ** (rng.uniform(-95.0, -55.0) / 20))
    kind = str(rng.choice(list(NOISES)))
    below = rng.uniform(15.0, 35.0) if draw < 0.85 else rng.uniform(3.0, 15.0)  # dB
    return noise(kind, length, rng, others) * np.float32(loudness * 10.0 ** (-below / 20))


def _clicks(length: int, loudness: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return what a button, a chair or a breath sounds like: short bursts, few of them."""
    made_N = np.zeros(length, np.float32)
    for _ in range(int(rng.integers(1, 5))):
        count = min(length, int(np.exp(rng.uniform(np.log(0.002), np.log(0.3))) * RATE))
        at = int(rng.integers(length - count + 1))
        burst = rng.standard_normal(count, np.float32) * np.hanning(count).astype(np.float32)
        if rng.random() < 0.5:
            burst = np.cumsum(burst) / np.float32(np.sqrt(count))
        made_N[at:at + count] += burst * np.float32(loudness * 10.0 ** rng.uniform(-2.0, 0.3))
    return made_N


def _microphone(whole_N: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the recording through a microphone: a band, a tilt, resonances, 16 bits, clipping."""
    size = _fast(len(whole_N))
    hertz = np.arange(size // 2 + 1, dtype=np.float32) * np.float32(RATE / size)
    low = np.float32(np.exp(rng.uniform(np.log(20.0), np.log(250.0))))
    octaves = np.log2(np.maximum(hertz, 20.0) / np.float32(1000.0))
    decibels = np.float32(rng.uniform(-3.0, 3.0)) * octaves
    decibels -= 10 * np.log10(1 + (low / np.maximum(hertz, 1.0)) ** 4)
    if rng.random() < _BAND:
        high = np.float32(rng.uniform(3200.0, 7500.0))
        decibels -= 10 * np.log10(1 + (hertz / high) ** 16)
    for _ in range(int(rng.integers(0, 4))):
        centre = np.float32(rng.uniform(-3.0, 3.0))
        decibels += np.float32(rng.uniform(-6.0, 6.0)) * np.exp(
            -np.square((octaves - centre) / np.float32(rng.uniform(0.2, 1.0))))
    peak = float(np.abs(whole_N).max())
    spectrum = np.fft.rfft(whole_N, size) * 10.0 ** (decibels / 20)
    heard_N = _scaled(np.fft.irfft(spectrum, size)[:len(whole_N)], peak)
    if rng.random() < _CLIPPED:
        heard_N *= np.float32(rng.uniform(1.2, 3.0) / max(peak, 1e-6))
    return np.asarray(np.round(np.clip(heard_N, -1.0, 1.0) * 32767) / 32767, np.float32)


def _scaled(samples_N: NDArray[np.floating], peak: float) -> NDArray[np.float32]:
    """Return samples whose loudest is `peak`."""
    return np.asarray(
        samples_N * (peak / max(1e-9, float(np.abs(samples_N).max()))), np.float32)


def _fast(length: int) -> int:
    """Return a length of a few small factors, at least `length`, that is transformed quickly."""
    unit = 1 << max(0, (length - 1).bit_length() - 4)
    return -(-length // unit) * unit
