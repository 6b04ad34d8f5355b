"""The operators' schemas, and the shapes of what they give, for `torch.export`.

`cpu/operators.cc` implements them for ExecuTorch, `reference.py` says what they mean.
"""

from __future__ import annotations

from enum import IntEnum

import torch

__all__ = ["SCALE_BYTES", "Input"]

SCALE_BYTES = 4  # of a head at a position, behind its entries in a cache of 8 bits


class Input(IntEnum):
    """What `linear` does with its input first; the numbers are those of `cpu/run.h`."""

    PLAIN = 0
    NORMED = 1
    GATED_SILU = 2  # silu(left half) * right half
    GATED_GELU = 3


_LINEAR = (
    "Tensor x, Tensor weights, int format, int outputs, int input, Tensor? norm, float eps, "
    "Tensor? bias, Tensor? residual, bool whole")
_ATTENTION = (
    "Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt start, "
    "Tensor? cos, Tensor? sin, Tensor? q_norm, "
    "Tensor? k_norm, int heads, float eps, float scale, float softcap, int window")
_EMBEDDING = "Tensor tokens, Tensor weights, int format, int rows, int size"
_NORM = "Tensor x, Tensor weight, float eps, Tensor? residual"
_library = torch.library.Library("cloister", "FRAGMENT")
for name, arguments, out in (
    ("linear", _LINEAR, "a"), ("attention", _ATTENTION, "c"), ("embedding", _EMBEDDING, "a"),
    ("norm", _NORM, "a"),
):
    _library.define(f"{name}({arguments}) -> Tensor")
    _library.define(f"{name}.out({arguments}, *, Tensor({out}!) out) -> Tensor({out}!)")


def _linear(
    x: torch.Tensor, weights: torch.Tensor, form: int, outputs: int, *_: object  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _attention(qkv: torch.Tensor, k_cache: torch.Tensor, *rest: object) -> torch.Tensor:
    heads = rest[6]
    assert isinstance(heads, int)
    scale = SCALE_BYTES if k_cache.dtype is torch.int8 else 0
    return qkv.new_empty(*qkv.shape[:-1], heads * (k_cache.shape[-1] - scale))


def _embedding(
    tokens: torch.Tensor, weights: torch.Tensor, form: int, rows: int, size: int  # noqa: ARG001
) -> torch.Tensor:
    return weights.new_empty(*tokens.shape, size, dtype=torch.float32)


def _norm(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


for name, fake in (
    ("linear", _linear), ("attention", _attention), ("embedding", _embedding), ("norm", _norm),
):
    torch.library.register_fake(f"cloister::{name}", fake, lib=_library)
