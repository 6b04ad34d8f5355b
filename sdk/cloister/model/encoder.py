"""The encoder of pictures and of sound: one architecture, every layout by configuration.

Shapes: B batch, C channels, R rows (pixels of height, or mel bins), W columns (pixels of width, or
frames), N positions, D hidden size, H heads, K head size.

Covers SigLIP (Gemma 3), the vision encoder of Idefics3 and SmolVLM, Whisper's encoder (Voxtral),
and small encoders of our own. Every position attends to every other; nothing is masked, so an input
is read whole, padding included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from cloister.errors import SettingError

__all__ = ["Encoder", "EncoderBlock", "EncoderShape", "Stem"]


class Stem(StrEnum):
    """The layers that turn pixels or frames into positions."""

    PATCHES = "patches"  # one convolution over squares that do not overlap
    CONVOLUTIONS_1D = "convolutions1d"  # two over frames, of which the second halves them (Whisper)
    CONVOLUTIONS_2D = "convolutions2d"  # some that halve rows and columns, and a linear layer


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """Dimensions of an encoder.

    Raises:
        SettingError: a dimension is out of bounds, or is set and the stem does not have it.
    """

    stem: Stem
    rows: int  # pixels of height, or mel bins
    positions: int  # that have a stored vector: those of the longest input
    hidden_size: int
    layers: int
    heads: int
    feed_forward: int
    channels: int = 1  # 3 for colours
    patch: int = 0  # pixels of a patch's side
    halvings: int = 0  # two-dimensional convolutions
    width: int = 0  # channels between them
    kernel: int = 0  # positions that a convolution in each layer spans; 0: there is none
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = 1e-5
    key_bias: bool = True  # Whisper has none

    def __post_init__(self) -> None:
        own: tuple[str, ...] = ()
        if self.stem is Stem.PATCHES:
            own = ("patch",)
        elif self.stem is Stem.CONVOLUTIONS_2D:
            own = ("halvings", "width")
        for name in ("rows", "positions", "hidden_size", "layers", "heads", "feed_forward",
                     "channels", *own):
            most = 16 if name == "halvings" else 2**24
            if not 1 <= getattr(self, name) <= most:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be from 1 to {most}.")
        for name in {"patch", "halvings", "width"}.difference(own):
            if getattr(self, name):
                raise SettingError(f"{name} is {getattr(self, name)}; with {self.stem} leave it 0.")
        if self.kernel and (
            self.stem is Stem.PATCHES or not 0 < self.kernel < 2**10 or self.kernel % 2 == 0
        ):
            raise SettingError(
                f"kernel is {self.kernel}; it must be odd and below 1024, and 0 with patches.")
        if not 0.0 < self.norm_eps < math.inf:
            raise SettingError(f"norm_eps is {self.norm_eps}; it must be finite and above 0.")
        if self.activation not in ("gelu", "gelu_tanh"):
            raise SettingError(f"Activation {self.activation} is not known; use gelu or gelu_tanh.")
        if self.stem is Stem.CONVOLUTIONS_1D and self.channels != 1:
            raise SettingError(f"channels is {self.channels}; mel frames have 1.")
        for name, size, part in (
            ("hidden_size", self.hidden_size, self.heads),
            ("rows", self.rows, 1 if self.stem is Stem.CONVOLUTIONS_1D else self.stride),
            ("positions", self.positions, self.grid_rows),
        ):
            if size % part:
                raise SettingError(f"{name} is {size}; it must be a multiple of {part}.")

    @property
    def stride(self) -> int:
        """Columns of the input that make one of positions."""
        if self.stem is Stem.PATCHES:
            return self.patch
        return 2 if self.stem is Stem.CONVOLUTIONS_1D else 2**self.halvings

    @property
    def grid_rows(self) -> int:
        """Positions in one column: 1, but for patches."""
        return self.rows // self.patch if self.stem is Stem.PATCHES else 1

    @property
    def columns(self) -> int:
        """Columns of the longest input."""
        return self.positions // self.grid_rows * self.stride

    def positions_of(self, columns: int) -> int:
        """Return the number of positions of an input of `columns`.

        A column of patches that is not whole is left out; convolutions pad the last stride.
        """
        whole = columns if self.stem is Stem.PATCHES else columns + self.stride - 1
        return self.grid_rows * (whole // self.stride)


class _Patches(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            shape.channels, shape.hidden_size, kernel_size=shape.patch, stride=shape.patch)

    def forward(self, x_BCRW: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.convolution(x_BCRW)
        return out


class _Convolutions1d(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.first = nn.Conv1d(shape.rows, shape.hidden_size, kernel_size=3, padding=1)
        self.second = nn.Conv1d(
            shape.hidden_size, shape.hidden_size, kernel_size=3, stride=2, padding=1)

    def forward(self, x_B1RW: torch.Tensor) -> torch.Tensor:
        x_BDW = functional.gelu(self.first(x_B1RW.squeeze(1)))
        return functional.gelu(self.second(x_BDW)).unsqueeze(2)


class _Convolutions2d(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(shape.width if number else shape.channels, shape.width,
                      kernel_size=3, stride=2, padding=1)
            for number in range(shape.halvings))
        self.linear = nn.Linear(shape.width * (shape.rows // shape.stride), shape.hidden_size)

    def forward(self, x_BCRW: torch.Tensor) -> torch.Tensor:
        for convolution in self.convolutions:
            x_BCRW = functional.gelu(convolution(x_BCRW))
        out_BWD: torch.Tensor = self.linear(x_BCRW.flatten(1, 2).transpose(1, 2))
        return out_BWD.transpose(1, 2).unsqueeze(2)


_STEMS = {
    Stem.PATCHES: _Patches, Stem.CONVOLUTIONS_1D: _Convolutions1d,
    Stem.CONVOLUTIONS_2D: _Convolutions2d,
}


class _Attention(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.head_size = size // shape.heads
        self.q, self.v, self.o = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.k = nn.Linear(size, size, bias=shape.key_bias)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        q_BHNK, k_BHNK, v_BHNK = (
            each(x_BND).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for each in (self.q, self.k, self.v))
        out_BHNK = functional.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        out_BND: torch.Tensor = self.o(out_BHNK.transpose(1, 2).flatten(2))
        return out_BND


class _FeedForward(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden_size, shape.feed_forward)
        self.down = nn.Linear(shape.feed_forward, shape.hidden_size)
        self.approximate = "tanh" if shape.activation == "gelu_tanh" else "none"

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        x_BNF = functional.gelu(self.up(x_BND), approximate=self.approximate)
        out_BND: torch.Tensor = self.down(x_BNF)
        return out_BND


class _Convolution(nn.Module):
    """A gated convolution over positions (Conformer, arXiv 2005.08100, without batch norm)."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.gate = nn.Linear(size, 2 * size)
        self.depth = nn.Conv1d(
            size, size, kernel_size=shape.kernel, padding=shape.kernel // 2, groups=size)
        self.down = nn.Linear(size, size)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        x_BDN = functional.glu(self.gate(x_BND), dim=-1).transpose(1, 2)
        out_BND: torch.Tensor = self.down(functional.silu(self.depth(x_BDN)).transpose(1, 2))
        return out_BND


class EncoderBlock(nn.Module):
    """One encoder layer: attention, perhaps a convolution, and feed-forward.

    Each stands behind a norm and a residual.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attn = _Attention(shape)
        self.convolves = shape.kernel > 0
        if self.convolves:
            self.convolution_norm = nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps)
            self.convolution = _Convolution(shape)
        self.mlp_norm = nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = _FeedForward(shape)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Map [B, N, D] -> [B, N, D]."""
        x_BND = x_BND + self.attn(self.attn_norm(x_BND))
        if self.convolves:
            x_BND = x_BND + self.convolution(self.convolution_norm(x_BND))
        out_BND: torch.Tensor = x_BND + self.mlp(self.mlp_norm(x_BND))
        return out_BND


class Encoder(nn.Module):
    """A bidirectional transformer over patches or frames.

    An input narrower than the longest takes the first columns of the stored positions.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.stem = _STEMS[shape.stem](shape)
        self.positions = nn.Parameter(torch.zeros(shape.positions, shape.hidden_size))
        self.layers = nn.ModuleList(EncoderBlock(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps)

    def initialize(self, seed: int) -> None:
        """Set weights to train from: normal, std 0.02, residual outputs scaled by depth.

        Convolutions keep the size of what they read; positions are sinusoids, as Whisper's are.
        """
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "positions":
                    parameter.copy_(sinusoids(*parameter.shape))
                elif parameter.dim() > 2:
                    gain = 2.0 / parameter[0].numel()
                    parameter.normal_(std=gain**0.5, generator=rng)
                elif name.endswith(("attn.o.weight", ".down.weight")):
                    std = 0.02 / (2 * self.shape.layers) ** 0.5
                    parameter.normal_(std=std, generator=rng)
                elif parameter.dim() == 2:
                    parameter.normal_(std=0.02, generator=rng)
                else:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)

    def forward(self, x_BCRW: torch.Tensor) -> torch.Tensor:
        """Map float[B, C, R, W] -> [B, N, D], positions row by row."""
        x_BND = self.embed(x_BCRW)
        for layer in self.layers:
            x_BND = layer(x_BND)
        out_BND: torch.Tensor = self.norm(x_BND)
        return out_BND

    def embed(self, x_BCRW: torch.Tensor) -> torch.Tensor:
        """Return what the first layer reads, [B, N, D]."""
        x_BDRW = self.stem(x_BCRW)
        grid_RWD = self.positions.unflatten(0, (self.shape.grid_rows, -1))
        x_BRWD = x_BDRW.permute(0, 2, 3, 1) + grid_RWD.narrow(1, 0, x_BDRW.shape[3])
        out_BND: torch.Tensor = x_BRWD.flatten(1, 2)
        return out_BND


def sinusoids(positions: int, size: int) -> torch.Tensor:
    """Return sines and cosines of falling frequencies, float32[N, D] (arXiv 1706.03762)."""
    falling = torch.arange((size + 1) // 2) * (math.log(10_000.0) / max(1, (size + 1) // 2 - 1))
    angles = torch.arange(positions).unsqueeze(1) * (-falling).exp()
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :size]
