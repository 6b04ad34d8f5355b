"""What stands before an encoder inside the program: pixels and samples as an encoder reads them.

Shapes: B batch, C channels, R rows, W columns, N samples, K frequencies of the transform, T frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from cloister.errors import SettingError

__all__ = ["Mel", "MelShape", "PixelScale", "Pixels", "mel_filters"]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey picture (ITU-R BT.601)


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """Mean and deviation of each channel, of pixels from 0 to 1.

    Raises:
        SettingError: other than one or three of each, or a deviation that is not above 0.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.deviation) or len(self.mean) not in (1, 3):
            raise SettingError("Pixels need a mean and a deviation for each of 1 or 3 channels.")
        if not all(map(math.isfinite, self.mean)) or not all(
                0.0 < each < math.inf for each in self.deviation):
            raise SettingError("A mean of pixels is not finite, or a deviation is not above 0.")

    @property
    def channels(self) -> int:
        """Channels that the encoder reads: 3 for colours, 1 for grey."""
        return len(self.mean)


@dataclass(frozen=True, kw_only=True)
class MelShape:
    """Lengths of a log-mel spectrum; by default Whisper's, but for the bins.

    Raises:
        SettingError: a length is out of bounds.
    """

    bins: int
    rate: int = 16_000  # samples a second
    window: int = 400  # samples
    hop: int = 160  # samples from frame to frame

    def __post_init__(self) -> None:
        for name, most in (("bins", 1024), ("rate", 192_000), ("window", 8192), ("hop", 8192)):
            if not 1 <= getattr(self, name) <= most:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be from 1 to {most}.")
        if self.window % 2 or self.window < 2 * self.hop:
            raise SettingError(
                f"window is {self.window}; it must be even, and at least two hops of {self.hop}.")


class Pixels(nn.Module):
    """Pixels scaled as the encoder was trained: uint8[B, 3, R, W] -> float32[B, C, R, W]."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, scale: PixelScale) -> None:
        super().__init__()
        self.grey = scale.channels == 1
        with torch.device("cpu"):  # these are no weights, and stay there under "meta"
            mean, deviation = (
                torch.tensor(each, dtype=torch.float64).view(1, -1, 1, 1)
                for each in (scale.mean, scale.deviation))
            self.register_buffer("scale", (1 / (255 * deviation)).float(), persistent=False)
            self.register_buffer("shift", (-mean / deviation).float(), persistent=False)

    def forward(self, x_B3RW: torch.Tensor) -> torch.Tensor:
        """Return the scaled pixels, of grey ones the luma."""
        x_BCRW = x_B3RW.float()
        if self.grey:
            red, green, blue = x_BCRW.split(1, dim=1)
            x_BCRW = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
        return x_BCRW * self.scale + self.shift


class Mel(nn.Module):
    """The log-mel spectrum of Whisper (arXiv 2212.04356): float32[B, 1, N] -> [B, 1, bins, T].

    T = N / hop. The transform is a convolution, which every backend has. What is more than eight
    powers of ten below the loudest is raised to there, so a frame depends on the whole recording.
    """

    waves: torch.Tensor
    filters: torch.Tensor

    def __init__(self, shape: MelShape) -> None:
        super().__init__()
        self.shape = shape
        with torch.device("cpu"):
            waves = _waves(shape.window).float()
            filters = mel_filters(shape).float().unsqueeze(-1)
            self.register_buffer("waves", waves, persistent=False)
            self.register_buffer("filters", filters, persistent=False)

    def forward(self, x_B1N: torch.Tensor) -> torch.Tensor:
        """Return the spectrum of a recording, about 0 with a deviation of about 0.5."""
        half = self.shape.window // 2
        x_B1N = functional.pad(x_B1N, (half, half - self.shape.hop), mode="reflect")
        real_BKT, imaginary_BKT = functional.conv1d(
            x_B1N, self.waves, stride=self.shape.hop).chunk(2, dim=1)
        power_BKT = real_BKT * real_BKT + imaginary_BKT * imaginary_BKT
        return self.scaled(functional.conv1d(power_BKT, self.filters))

    @staticmethod
    def scaled(power_BRT: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the power in each bin, as the encoder reads it, [B, 1, bins, T].
        """
        log_BRT = power_BRT.clamp(min=1e-10).log10()
        floor_B11 = log_BRT.amax(dim=(1, 2), keepdim=True) - 8.0
        return (torch.maximum(log_BRT, floor_B11) + 4.0).mul(0.25).unsqueeze(1)


def _waves(window: int) -> torch.Tensor:
    """Return cosines and sines under a Hann window, float64[2 * K, 1, window]."""
    at = torch.arange(window, dtype=torch.float64)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * at / window)
    turns = torch.outer(torch.arange(window // 2 + 1, dtype=torch.float64), at) % window
    angles = 2 * math.pi / window * turns
    return (torch.cat((angles.cos(), -angles.sin())) * hann).unsqueeze(1)


def mel_filters(shape: MelShape) -> torch.Tensor:
    """Return triangles of equal area, even on Slaney's mel scale, float64[bins, K]."""
    nyquist = shape.rate / 2
    edges = _hertz(torch.linspace(0.0, _mel(nyquist), shape.bins + 2, dtype=torch.float64))
    frequencies = torch.linspace(0.0, nyquist, shape.window // 2 + 1, dtype=torch.float64)
    low, middle, high = (edges[at:at + shape.bins, None] for at in range(3))
    rising = (frequencies - low) / (middle - low)
    falling = (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0.0) * (2.0 / (high - low))


_LINEAR, _STEP = 1000.0, math.log(6.4) / 27  # Slaney: even up to 1 kHz, then by a factor a mel


def _mel(hertz: float) -> float:
    if hertz < _LINEAR:
        return hertz * 3 / 200
    return _LINEAR * 3 / 200 + math.log(hertz / _LINEAR) / _STEP


def _hertz(mels: torch.Tensor) -> torch.Tensor:
    bend = _LINEAR * 3 / 200
    return torch.where(
        mels < bend, mels * 200 / 3, _LINEAR * ((mels - bend) * _STEP).exp())
