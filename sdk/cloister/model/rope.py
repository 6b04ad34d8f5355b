"""Rotary position embeddings and their scaling variants.

Shapes: T positions, H heads, D head size. Source: RoFormer (arXiv 2104.09864), in the layout of
the Llama checkpoints, where the first half of a head is paired with the second.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cloister.model.config import RopeScaling

__all__ = ["frequencies", "rotate", "table"]


def frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Return angular frequencies, float32[D/2], radians a position."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, head_size, theta, scaling)


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Stretch long wavelengths and keep short ones, with a linear ramp in between."""
    rotations = scaling.original_context * plain / (2 * math.pi)  # turns in the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    ramp = ((rotations - low) / (high - low)).clamp(0, 1)
    return ramp * plain + (1 - ramp) * plain / scaling.factor


def _yarn(plain: torch.Tensor, head_size: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Interpolate by NTK-by-parts (arXiv 2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        ratio = scaling.original_context / (rotations * 2 * math.pi)
        return head_size * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    ramp = ((torch.arange(head_size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def table(
    head_size: int, context: int, theta: float, scaling: RopeScaling | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of every position, float32[context, 1, D] each."""
    angles = torch.outer(
        torch.arange(context, dtype=torch.float32), frequencies(head_size, theta, scaling)
    )
    both = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return both.cos() * factor, both.sin() * factor


def rotate(x_BTHD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of features by its position's angle, [B, T, H, D] -> [B, T, H, D]."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D
