"""The configuration of a decoder: one frozen record for every layout that is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from cloister.errors import SettingError
from cloister.tiers import Shape  # noqa: TC001  # read at run time, by `records`

__all__ = ["Activation", "ModelConfig", "RopeScaling"]


class Activation(StrEnum):
    """The gate of the feed-forward layer."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The scaling of rotary frequencies past the trained context.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides the low ones only,
    with a ramp between the two wavelength bounds. `yarn` (arXiv 2309.00071) does so by rotations
    over the original context and also scales the cosines and sines by `attention_factor`.

    Raises:
        SettingError: an unknown kind, a factor below 1, another number that is not finite and
            above 0, or a ramp (from low to high, from slow to fast) that does not rise.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # tokens
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "yarn"):
            raise SettingError(
                f"Rotary scaling {self.kind!r} is not known; use linear, llama3 or yarn."
            )
        if not 1.0 <= self.factor < math.inf:
            raise SettingError(f"Rotary scaling factor is {self.factor}; it must be at least 1.")
        for name in (
            "low_freq_factor", "high_freq_factor", "original_context", "beta_fast", "beta_slow",
            "attention_factor",
        ):
            _check_above(0.0, name, getattr(self, name))
        _check_above(self.low_freq_factor, "high_freq_factor", self.high_freq_factor)
        _check_above(self.beta_slow, "beta_fast", self.beta_fast)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything but the weights that decides what a decoder computes.

    Raises:
        SettingError: a value outside its bound, or a per-layer list of the wrong length.
    """

    shape: Shape
    activation: Activation = Activation.SILU
    norm_eps: float = 1e-5
    norm_offset: bool = False  # norms multiply by 1 + weight (Gemma)
    post_norms: bool = False  # norms also after attention and feed-forward (Gemma)
    qk_norm: bool = False  # norm on each query and key head
    qkv_bias: bool = False
    output_bias: bool = False  # bias on the attention output
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None  # None: head_size ** -0.5
    attention_softcap: float | None = None  # logits become cap * tanh(logits / cap)
    final_softcap: float | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # base of the layers with a window, unscaled (Gemma 3)
    window: int | None = None  # positions a windowed layer sees, its own included
    windowed_layers: tuple[int, ...] = ()
    no_rope_layers: tuple[int, ...] = ()  # layers without rotary embedding (SmolLM3)

    def __post_init__(self) -> None:
        for name in ("norm_eps", "embedding_scale"):
            _check_above(0.0, name, getattr(self, name))
        _check_above(1.0, "rope_theta", self.rope_theta)
        if self.local_rope_theta is not None:
            _check_above(1.0, "local_rope_theta", self.local_rope_theta)
        for name in ("query_scale", "attention_softcap", "final_softcap"):
            if getattr(self, name) is not None:
                _check_above(0.0, name, getattr(self, name))
        for name in ("windowed_layers", "no_rope_layers"):
            bad = [i for i in getattr(self, name) if not 0 <= i < self.shape.layers]
            if bad:
                raise SettingError(
                    f"{name} names layer {bad[0]}; the model has layers 0 to "
                    f"{self.shape.layers - 1}."
                )
        if self.windowed_layers and (self.window is None or self.window < 1):
            raise SettingError(f"window is {self.window}; windowed layers need at least 1.")

    def window_of(self, layer: int) -> int | None:
        """Return the number of positions that `layer` sees, or None where it sees all."""
        return self.window if layer in self.windowed_layers else None

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.shape.head_size**-0.5 if self.query_scale is None else self.query_scale


def _check_above(bound: float, name: str, value: float) -> None:
    if not bound < value < math.inf:  # false for NaN, too
        raise SettingError(f"{name} is {value}; it must be a finite number above {bound:g}.")
