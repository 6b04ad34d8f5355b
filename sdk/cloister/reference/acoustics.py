"""Recordings out of clean speech: speed, a room, noise, a microphone, and silence around it.

Shapes: B recordings at once, N samples at 16 kHz, float32 between -1 and 1. What is random comes
from the generator that is passed: on one device the same one gives the same samples. No function
waits for the device.

Silence is the trap: people press a button, wait, speak and wait again, so an encoder that has not
heard seconds of silence hears words in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cloister.errors import SettingError
from cloister.reference.noises import NOISES, Draw, fast, noise, peak, room, scaled, tensor
from cloister.reference.speech import RATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["at_speed", "record"]

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
    return made_BN * (n_N < tensor(np.array(shorter), x_BN.device)[:, None]), shorter


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
    draw = Draw(len(lengths_B), rng, x_BN.device)
    at_B = (rng.integers(length - lengths_B + 1) if before is None
            else np.full(draw.rows, before, np.int64))
    level_B1 = draw.column(np.exp(rng.normal(np.log(0.3), 0.6, draw.rows)))
    whole_BN = torch.zeros(draw.rows, length, device=draw.device)
    draw.add(whole_BN, x_BN, at_B, lengths_B)
    whole_BN = scaled(whole_BN, level_B1)
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


def _background(loudness_B1: Tensor, length: int, draw: Draw, others: Tensor | None) -> Tensor:
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


def _add_clicks(whole_BN: Tensor, loudness_B1: Tensor, draw: Draw) -> None:
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


def _microphone(x_BN: Tensor, draw: Draw) -> Tensor:
    """Return recordings through a microphone: a band, a tilt, resonances, 16 bits, clipping."""
    rng, rows, length = draw.rng, *x_BN.shape
    size = fast(length)
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
    peak_B1 = peak(x_BN)
    heard_BN = scaled(torch.fft.irfft(spectrum_BF, size)[:, :length], peak_B1)
    heard_BN *= torch.where(draw.column(rng.random(rows) < _CLIPPED),
                            draw.uniform(1.2, 3.0) / peak_B1.clamp(min=1e-6), 1.0)
    return (heard_BN.clamp(-1.0, 1.0) * 32767).round() / 32767


def _sizes(count: int, factor: float) -> tuple[int, int]:
    """Return two sizes of small factors in the ratio of `factor`, the first at least `count`."""
    unit = 1 << max(0, count.bit_length() - 9)
    first = -(-count // unit)
    pairs = [(size, max(1, round(size / factor))) for size in range(first, 2 * first + 64)]
    before, after = min(
        (pair for pair in pairs if all(_SMALL % size == 0 for size in pair)),
        key=lambda pair: (round(abs(pair[0] / pair[1] / factor - 1) / 1e-3), pair))
    return before * unit, after * unit
