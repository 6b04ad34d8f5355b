"""Recordings out of clean speech: speed, a room, noise, a microphone, and silence around it.

Shapes: B recordings at once, N samples at 16 kHz, float32 between -1 and 1. What is random comes
from the generator that is passed: on one device the same one gives the same samples. No function
waits for the device.

Silence is the trap: people press a button, wait, speak and wait again, so an encoder that has not
heard seconds of silence hears words in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cloister.errors import SettingError
from cloister.reference.speech import RATE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["NOISES", "at_speed", "noise", "record", "room"]

_ROOM = 0.45  # share of the recordings in which one hears the room
_CLICKS = 0.3
_CLIPPED = 0.04
_BAND = 0.35  # share of microphones that cut high frequencies
_MUTED = 0.08  # share of recorders that mute what is quiet
_SMALL = (2 * 3 * 5 * 7 * 11 * 13) ** 12  # a multiple of the sizes below 4,096 of these factors


def at_speed(
    x_BN: Tensor, lengths: Sequence[int], factor: float
) -> tuple[Tensor, list[int]]:
    """Return speech `factor` times as fast and as high, as of smaller speakers, and its lengths.

    `lengths` are the samples of each row that are speech; the rest stays zero. The speed is
    `factor` to about 0.1 %: sizes are taken whose Fourier transform is quick.
    """
    if factor == 1.0:
        return x_BN, list(lengths)
    count = x_BN.shape[1]
    before, after = _sizes(count, factor)
    made_BN = torch.fft.irfft(torch.fft.rfft(x_BN, before), after) * (after / before)
    made_BN = made_BN[:, :round(count * after / before)]
    shorter = [round(length * after / before) for length in lengths]
    n_N = torch.arange(made_BN.shape[1], device=x_BN.device)
    return made_BN * (n_N < _tensor(np.array(shorter), x_BN.device)[:, None]), shorter


def record(
    x_BN: Tensor, lengths: Sequence[int], length: int, rng: np.random.Generator, *,
    others: Tensor | None = None, before: int | None = None,
) -> Tensor:
    """Return recordings of `length` samples, each of a row's speech, somewhere in it.

    `lengths` are the samples of each row that are speech. `others`, float32[K, M] with zeros after
    the speech, is what babble in the background is made of; there is none without. `before` are
    the samples that the speech begins after, drawn for each row if it is None.

    Raises:
        SettingError: the speech does not fit.
    """
    lengths_B = np.asarray(lengths, np.int64)
    if lengths_B.max() + (before or 0) > length:
        raise SettingError(
            f"Speech of {lengths_B.max()} samples after {before or 0} does not fit into {length}; "
            "make the recording longer.")
    draw = _Draw(len(lengths_B), rng, x_BN.device)
    at_B = (rng.integers(length - lengths_B + 1) if before is None
            else np.full(draw.rows, before, np.int64))
    level_B1 = draw.column(np.exp(rng.normal(np.log(0.3), 0.6, draw.rows)))
    whole_BN = torch.zeros(draw.rows, length, device=draw.device)
    draw.add(whole_BN, x_BN, at_B, lengths_B)
    whole_BN = _scaled(whole_BN, level_B1)
    heard_B = rng.random(draw.rows) < _ROOM
    if heard_B.any():
        heard, index = draw.chosen(heard_B)
        whole_BN[heard] = room(whole_BN[index], rng)[:len(heard)]
    n_N = torch.arange(length, device=draw.device)
    at_B1, count_B1 = draw.column(at_B), draw.column(lengths_B)
    spoken_BN = whole_BN * ((n_N >= at_B1) & (n_N < at_B1 + count_B1))
    loudness_B1 = (spoken_BN.square().sum(1, keepdim=True) / count_B1.clamp(min=1)).sqrt()
    whole_BN += _background(loudness_B1, length, draw, others)
    _add_clicks(whole_BN, loudness_B1, draw)
    return _microphone(whole_BN, draw)


def room(x_BN: Tensor, rng: np.random.Generator) -> Tensor:
    """Return what is heard in a room each: early echoes, and noise that dies away by 60 dB."""
    draw = _Draw(len(x_BN), rng, x_BN.device)
    count, late, early = (int(seconds * RATE) for seconds in (0.7, 0.03, 0.004))
    n_N = torch.arange(count, device=draw.device)
    count_B1 = draw.uniform(0.12 * RATE, count)
    response_BN = draw.normal(count) * 10.0 ** (-3.0 * n_N / count_B1) * (n_N < count_B1)
    response_BN[:, :early] = 0.0  # nothing comes before the nearest wall's echo
    response_BN *= 10.0 ** (draw.uniform(-18.0, 3.0) / 20) / torch.linalg.vector_norm(
        response_BN, dim=1, keepdim=True)
    for _ in range(6):
        at_B1 = draw.column(rng.integers(RATE // 1000, late, draw.rows))
        response_BN.scatter_add_(1, at_B1, draw.uniform(-0.4, 0.4))
    response_BN[:, 0] = 1.0
    size = _fast(x_BN.shape[1] + count)
    spectrum_BF = torch.fft.rfft(x_BN, size) * torch.fft.rfft(response_BN, size)
    return _scaled(torch.fft.irfft(spectrum_BF, size)[:, :x_BN.shape[1]], _peak(x_BN))


def noise(
    kind: str, rows: int, length: int, rng: np.random.Generator, device: torch.device,
    others: Tensor | None = None,
) -> Tensor:
    """Return noise of one of the `NOISES`, float32[B, N], with a mean square of 1 in each row.

    Raises:
        SettingError: there is no such noise.
    """
    if kind not in NOISES:
        raise SettingError(f"Noise {kind} is not known; use {', '.join(NOISES)}.")
    made_BN = NOISES[kind](length, _Draw(rows, rng, device), others)
    return made_BN / (made_BN.square().mean(1, keepdim=True).sqrt() + 1e-6)


def _white(length: int, draw: _Draw, _: Tensor | None) -> Tensor:
    return draw.normal(length)


def _coloured(length: int, draw: _Draw, _: Tensor | None) -> Tensor:
    """Return noise that falls with frequency, from nearly white to brown."""
    size = _fast(length)
    bins_F = torch.arange(1, size // 2 + 2, device=draw.device)
    falling_BF = torch.pow(bins_F, -draw.uniform(0.2, 1.2))
    made_BN: Tensor = torch.fft.irfft(torch.fft.rfft(draw.normal(size)) * falling_BF, size)
    return made_BN[:, :length]


def _hum(length: int, draw: _Draw, _: Tensor | None) -> Tensor:
    """Return the mains and its harmonics, as of a refrigerator or a fan."""
    base_B = draw.rng.choice([50.0, 60.0, 0.0], draw.rows)  # hertz; 0 for another
    base_B = np.where(base_B > 0, base_B, draw.rng.uniform(80.0, 240.0, draw.rows))
    turn_B1 = draw.column(2 * np.pi * base_B)
    seconds_N = torch.arange(length, device=draw.device) / RATE
    made_BN = 0.05 * draw.normal(length)
    for harmonic in range(1, 7):
        made_BN += draw.uniform(0.0, 1.0 / harmonic) * torch.sin(
            turn_B1 * harmonic * seconds_N + draw.uniform(0.0, 6.28))
    return made_BN


def _babble(length: int, draw: _Draw, others: Tensor | None) -> Tensor:
    """Return several voices at once, far away, each over and over; coloured noise without any."""
    if others is None:
        return _coloured(length, draw, others)
    m_M = torch.arange(1, others.shape[1] + 1, device=draw.device)
    count_K = (m_M * (others != 0)).amax(1).clamp(min=1)  # samples before the zeros at the end
    n_N = torch.arange(length, device=draw.device)
    made_BN = torch.zeros(draw.rows, length, device=draw.device)
    voices_B = draw.rng.integers(3, 8, draw.rows)
    for voice in range(7):
        voice_B1 = draw.column(draw.rng.integers(len(others), size=draw.rows))
        count_B1 = count_K[voice_B1]
        begin_B1 = (draw.uniform(0.0, 1.0) * count_B1).long()
        voice_BN = others[voice_B1, (begin_B1 + n_N) % count_B1]
        made_BN += draw.uniform(0.2, 1.0) * draw.column(voice < voices_B) * voice_BN
    return made_BN


def _cafe(length: int, draw: _Draw, others: Tensor | None) -> Tensor:
    """Return babble in a room, a machine, and cups that clink."""
    made_BN = room(_babble(length, draw, others), draw.rng)
    made_BN = made_BN / (made_BN.square().mean(1, keepdim=True) + 1e-12).sqrt()
    machine_BN = _coloured(length, draw, others)
    machine_BN /= machine_BN.std(1, correction=0, keepdim=True) + 1e-6
    made_BN += draw.uniform(0.2, 0.8) * machine_BN
    clinks_B = draw.rng.integers(0, 5, draw.rows)
    seconds_N = torch.arange(int(0.4 * RATE), device=draw.device) / RATE
    for clink in range(4):
        loudness_B1 = draw.uniform(0.5, 4.0) * draw.column(clink < clinks_B)
        rung_BN = loudness_B1 * torch.exp(-draw.uniform(10.0, 60.0) * seconds_N) * torch.sin(
            2 * np.pi * draw.uniform(1500.0, 6000.0) * seconds_N)
        seconds_B = draw.rng.uniform(0.05, 0.4, draw.rows)
        count_B = np.minimum(length, (seconds_B * RATE).astype(int))
        draw.add(made_BN, rung_BN, draw.rng.integers(length - count_B + 1), count_B)
    return made_BN


NOISES: dict[str, Callable[[int, _Draw, Tensor | None], Tensor]] = {
    "white": _white, "coloured": _coloured, "hum": _hum, "babble": _babble, "cafe": _cafe,
}


def _background(loudness_B1: Tensor, length: int, draw: _Draw, others: Tensor | None) -> Tensor:
    """Return backgrounds: mostly those of quiet rooms, else a noise beneath the speech."""
    rng, rows = draw.rng, draw.rows
    draw_B = rng.random(rows)
    quiet_B = draw_B < 0.6
    kind_B = np.where(
        quiet_B, np.where(rng.random(rows) < 0.3, "white", "coloured"),
        rng.choice(list(NOISES), rows))
    below_B = np.where(quiet_B, rng.uniform(55.0, 95.0, rows), np.where(
        draw_B < 0.85, rng.uniform(15.0, 35.0, rows), rng.uniform(3.0, 15.0, rows)))  # dB
    made_BN = torch.zeros(rows, length, device=draw.device)
    for kind in NOISES:
        noisy_B = (kind_B == kind) & (draw_B >= _MUTED)
        if noisy_B.any():
            noisy, index = draw.chosen(noisy_B)
            made_BN[noisy] = noise(kind, len(index), length, rng, draw.device, others)[:len(noisy)]
    reference_B1 = torch.where(draw.column(quiet_B), 1.0, loudness_B1)
    return made_BN * (reference_B1 * draw.column(10.0 ** (-below_B / 20)))


def _add_clicks(whole_BN: Tensor, loudness_B1: Tensor, draw: _Draw) -> None:
    """Add what a button, a chair or a breath sounds like: short bursts, few of them."""
    rng, rows, length = draw.rng, *whole_BN.shape
    clicks_B = np.where(rng.random(rows) < _CLICKS, rng.integers(1, 5, rows), 0)
    n_N = torch.arange(int(0.3 * RATE), device=draw.device)
    for click in range(4):
        seconds_B = np.exp(rng.uniform(np.log(0.002), np.log(0.3), rows))
        count_B = np.minimum(length, (seconds_B * RATE).astype(int))
        count_B1 = draw.column(count_B)
        window_BN = 0.5 - 0.5 * torch.cos(2 * np.pi * n_N / (count_B1 - 1).clamp(min=1))
        burst_BN = draw.normal(len(n_N)) * window_BN
        burst_BN = torch.where(
            draw.column(rng.random(rows) < 0.5), burst_BN.cumsum(1) / count_B1.sqrt(), burst_BN)
        share_B1 = 10.0 ** draw.uniform(-2.0, 0.3) * draw.column(click < clicks_B)
        at_B = rng.integers(length - count_B + 1)
        draw.add(whole_BN, burst_BN * loudness_B1 * share_B1, at_B, count_B)


def _microphone(x_BN: Tensor, draw: _Draw) -> Tensor:
    """Return recordings through a microphone: a band, a tilt, resonances, 16 bits, clipping."""
    rng, rows, length = draw.rng, *x_BN.shape
    size = _fast(length)
    hertz_F = torch.arange(size // 2 + 1, device=draw.device) * (RATE / size)
    octaves_F = torch.log2(hertz_F.clamp(min=20.0) / 1000.0)
    low_B1 = draw.uniform(np.log(20.0), np.log(250.0)).exp()
    high_B1 = torch.where(
        draw.column(rng.random(rows) < _BAND), draw.uniform(3200.0, 7500.0), torch.inf)
    decibels_BF = draw.uniform(-3.0, 3.0) * octaves_F
    decibels_BF -= 10 * torch.log10(1 + (low_B1 / hertz_F.clamp(min=1.0)) ** 4)
    decibels_BF -= 10 * torch.log10(1 + (hertz_F / high_B1) ** 16)
    resonances_B = rng.integers(0, 4, rows)
    for resonance in range(3):
        height_B1 = draw.uniform(-6.0, 6.0) * draw.column(resonance < resonances_B)
        decibels_BF += height_B1 * torch.exp(
            -((octaves_F - draw.uniform(-3.0, 3.0)) / draw.uniform(0.2, 1.0)).square())
    spectrum_BF = torch.fft.rfft(x_BN, size) * 10.0 ** (decibels_BF / 20)
    peak_B1 = _peak(x_BN)
    heard_BN = _scaled(torch.fft.irfft(spectrum_BF, size)[:, :length], peak_B1)
    heard_BN *= torch.where(draw.column(rng.random(rows) < _CLIPPED),
                            draw.uniform(1.2, 3.0) / peak_B1.clamp(min=1e-6), 1.0)
    return (heard_BN.clamp(-1.0, 1.0) * 32767).round() / 32767


@dataclass(frozen=True)
class _Draw:
    """What is drawn for each row, as columns [B, 1] on the device."""

    rows: int
    rng: np.random.Generator
    device: torch.device

    def column(self, values_B: NDArray[np.generic]) -> Tensor:
        return _tensor(values_B[:, None], self.device)

    def uniform(self, low: float, high: float) -> Tensor:
        return self.column(self.rng.uniform(low, high, self.rows))

    def normal(self, length: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(int(self.rng.integers(2 ** 63)))
        return torch.randn(self.rows, length, generator=generator, device=self.device)

    def chosen(self, which_B: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """Return the numbers of some rows, and again filled up to one of eight counts.

        A GPU plans a Fourier transform anew for each number of rows, which takes longer than it.
        """
        rows = np.flatnonzero(which_B)
        unit = max(1, self.rows // 8)
        filled = np.resize(rows, -(-len(rows) // unit) * unit)
        return _tensor(rows, self.device), _tensor(filled, self.device)

    def add(
        self, whole_BN: Tensor, short_BM: Tensor, at_B: NDArray[np.int64],
        count_B: NDArray[np.int64],
    ) -> None:
        """Add the first `count_B` samples of `short_BM` to the whole, from `at_B` on."""
        length = whole_BN.shape[1]
        short_BM = short_BM[:, :length]
        m_M = torch.arange(short_BM.shape[1], device=self.device)
        kept_BM = short_BM * (m_M < self.column(count_B))
        whole_BN.scatter_add_(1, (m_M + self.column(at_B)) % length, kept_BM)


def _tensor(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """Return values on the device, floats as float32, without waiting for it."""
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    return torch.from_numpy(values).to(device, non_blocking=True)


def _scaled(x_BN: Tensor, peak_B1: Tensor) -> Tensor:
    """Return samples of which each row's loudest is `peak_B1`."""
    return x_BN * (peak_B1 / _peak(x_BN).clamp(min=1e-9))


def _peak(x_BN: Tensor) -> Tensor:
    return x_BN.abs().amax(1, keepdim=True)


def _sizes(count: int, factor: float) -> tuple[int, int]:
    """Return two sizes of small factors in the ratio of `factor`, the first at least `count`."""
    unit = 1 << max(0, count.bit_length() - 9)
    first = -(-count // unit)
    pairs = [(size, max(1, round(size / factor))) for size in range(first, 2 * first + 64)]
    before, after = min(
        (pair for pair in pairs if all(_SMALL % size == 0 for size in pair)),
        key=lambda pair: (round(abs(pair[0] / pair[1] / factor - 1) / 1e-3), pair))
    return before * unit, after * unit


def _fast(length: int) -> int:
    """Return a length of a few small factors, at least `length`, that is transformed quickly."""
    unit = 1 << max(0, (length - 1).bit_length() - 4)
    return next(unit * size for size in (1, 9, 10, 12, 14, 15, 16) if unit * size >= length)
