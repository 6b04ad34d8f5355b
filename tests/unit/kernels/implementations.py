"""The kernels of every instruction set of this processor, called without ExecuTorch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch

from cloister_kernels.library import objects
from cloister_kernels.ops import SCALE_BYTES

if TYPE_CHECKING:
    from cloister_kernels.pack import Format

SETS = ("avx512", "avxvnni", "avx2", "i8mm", "neon", "portable")
CACHES = (torch.float32, torch.float16, torch.int8)  # by their numbers in cpu/kernels.h


class Linear(Structure):
    _fields_ = (
        ("x", c_void_p), ("rows", c_int64), ("inputs", c_int64), ("input", c_int64),
        ("norm", c_void_p), ("eps", c_float), ("whole", c_bool), ("weights", c_void_p),
        ("format", c_int64), ("outputs", c_int64), ("bias", c_void_p), ("residual", c_void_p),
        ("out", c_void_p))


class Attention(Structure):
    _fields_ = (
        ("qkv", c_void_p), ("length", c_int64), ("start", c_int64), ("heads", c_int64),
        ("kv_heads", c_int64), ("size", c_int64), ("cos", c_void_p), ("sin", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("eps", c_float), ("scale", c_float),
        ("softcap", c_float), ("window", c_int64), ("cache", c_int64),
        ("k", c_void_p), ("v", c_void_p), ("out", c_void_p))


@cache
def library() -> ctypes.CDLL:
    folder = Path(mkdtemp(prefix="kernels-"))
    try:
        made = objects("c++", folder, [("abi.cc", "-fvisibility=default")])
        path = folder / "kernels.so"
        subprocess.run(["c++", "-shared", "-o", path, *made, "-lpthread"], check=True)
        loaded = ctypes.CDLL(str(path))
    finally:
        shutil.rmtree(folder)
    loaded.cloister_tile_bytes.restype = c_int64
    loaded.cloister_linear.argtypes = [c_char_p, POINTER(Linear), c_int64]
    loaded.cloister_attention.argtypes = [c_char_p, POINTER(Attention), c_int64]
    loaded.cloister_unpack.argtypes = [c_char_p, c_int64, c_void_p, c_int64, c_int64, c_void_p]
    return loaded


def here() -> list[str]:
    return [name for name in SETS if library().cloister_runs(name.encode())]


def address(x: torch.Tensor | None) -> int | None:
    assert x is None or x.is_contiguous()
    return None if x is None else x.data_ptr()


def linear(
    name: str, x_MK: torch.Tensor, packed: tuple[Format, torch.Tensor], outputs: int, *,
    threads: int = 1, kind: int = 0, whole: bool = False, **more: torch.Tensor
) -> torch.Tensor:
    """`more` are `norm`, `bias` and `residual`."""
    out = torch.empty(len(x_MK), outputs)
    inputs = x_MK.shape[1] // (2 if kind >= 2 else 1)
    form, weights = packed
    work = Linear(
        x=address(x_MK), rows=len(x_MK), inputs=inputs, input=kind, eps=1e-6, whole=whole,
        weights=address(weights), format=int(form), outputs=outputs, out=address(out),
        **{key: address(value) for key, value in more.items()})
    library().cloister_linear(name.encode(), byref(work), threads)
    return out


def attention(
    name: str, qkv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, threads: int = 1,
    tensors: dict[str, torch.Tensor], **settings: Any
) -> torch.Tensor:
    """`tensors` are cos, sin, q_norm and k_norm, as many as there are."""
    _, kv_heads, size = k.shape
    size -= SCALE_BYTES if k.dtype is torch.int8 else 0
    heads = qkv.shape[1] // size - 2 * kv_heads
    out = torch.empty(len(qkv), heads, size)
    work = Attention(
        qkv=address(qkv), length=len(qkv), heads=heads, kv_heads=kv_heads, size=size, eps=1e-6,
        cache=CACHES.index(k.dtype), k=address(k), v=address(v),
        out=address(out), scale=size ** -0.5,
        **{key: address(value) for key, value in tensors.items()}, **settings)
    library().cloister_attention(name.encode(), byref(work), threads)
    return out


def unpack(name: str, packed: tuple[Format, torch.Tensor], inputs: int, row: int) -> torch.Tensor:
    out = torch.empty(inputs)
    form, weights = packed
    library().cloister_unpack(
        name.encode(), int(form), address(weights), inputs, row, address(out))
    return out
