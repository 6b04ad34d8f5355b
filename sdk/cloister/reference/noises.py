"""Noises and rooms for recordings, of a batch at once.

Shapes: B recordings at once, N samples at 16 kHz, float32 between -1 and 1. What is random comes
from the generator that is passed: on one device the same one gives the same samples. No function
waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cloister.errors import SettingError
from cloister.reference.speech import RATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["NOISES", "Draw", "fast", "noise", "peak", "room", "scaled", "tensor"]


def room(x_BN: Tensor, rng: np.random.Generator) -> Tensor:
    """Return what is heard in a room each: early echoes, and noise that dies away by 60 dB."""
    draw = Draw(len(x_BN), rng, x_BN.device)
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
    size = fast(x_BN.shape[1] + count)
    spectrum_BF = torch.fft.rfft(x_BN, size) * torch.fft.rfft(response_BN, size)
    return scaled(torch.fft.irfft(spectrum_BF, size)[:, :x_BN.shape[1]], peak(x_BN))


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
    made_BN = NOISES[kind](length, Draw(rows, rng, device), others)
    return made_BN / (made_BN.square().mean(1, keepdim=True).sqrt() + 1e-6)


def _white(length: int, draw: Draw, _: Tensor | None) -> Tensor:
    return draw.normal(length)


def _coloured(length: int, draw: Draw, _: Tensor | None) -> Tensor:
    """Return noise that falls with frequency, from nearly white to brown."""
    size = fast(length)
    bins_F = torch.arange(1, size // 2 + 2, device=draw.device)
    falling_BF = torch.pow(bins_F, -draw.uniform(0.2, 1.2))
    made_BN: Tensor = torch.fft.irfft(torch.fft.rfft(draw.normal(size)) * falling_BF, size)
    return made_BN[:, :length]


def _hum(length: int, draw: Draw, _: Tensor | None) -> Tensor:
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


def _babble(length: int, draw: Draw, others: Tensor | None) -> Tensor:
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


def _cafe(length: int, draw: Draw, others: Tensor | None) -> Tensor:
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


NOISES: dict[str, Callable[[int, Draw, Tensor | None], Tensor]] = {
    "white": _white, "coloured": _coloured, "hum": _hum, "babble": _babble, "cafe": _cafe,
}


@dataclass(frozen=True)
class Draw:
    """What is drawn for each row, as columns [B, 1] on the device."""

    rows: int
    rng: np.random.Generator
    device: torch.device

    def column(self, values_B: NDArray[np.generic]) -> Tensor:
        """Return a value of each row."""
        return tensor(values_B[:, None], self.device)

    def uniform(self, low: float, high: float) -> Tensor:
        """Draw a number of each row."""
        return self.column(self.rng.uniform(low, high, self.rows))

    def normal(self, length: int) -> Tensor:
        """Draw white noise, float32[B, N]."""
        generator = torch.Generator(self.device).manual_seed(int(self.rng.integers(2 ** 63)))
        return torch.randn(self.rows, length, generator=generator, device=self.device)

    def chosen(self, which_B: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """Return the numbers of some rows, and again filled up to one of eight counts.

        A GPU plans a Fourier transform anew for each number of rows, which takes longer than it.
        """
        rows = np.flatnonzero(which_B)
        unit = max(1, self.rows // 8)
        filled = np.resize(rows, -(-len(rows) // unit) * unit)
        return tensor(rows, self.device), tensor(filled, self.device)

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


def tensor(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """Return values on the device, floats as float32, without waiting for it."""
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    return torch.from_numpy(values).to(device, non_blocking=True)


def scaled(x_BN: Tensor, peak_B1: Tensor) -> Tensor:
    """Return samples of which each row's loudest is `peak_B1`."""
    return x_BN * (peak_B1 / peak(x_BN).clamp(min=1e-9))


def peak(x_BN: Tensor) -> Tensor:
    """Return the loudest of each row, [B, 1]."""
    return x_BN.abs().amax(1, keepdim=True)


def fast(length: int) -> int:
    """Return a length of a few small factors, at least `length`, that is transformed quickly."""
    unit = 1 << max(0, (length - 1).bit_length() - 4)
    return next(unit * size for size in (1, 9, 10, 12, 14, 15, 16) if unit * size >= length)
