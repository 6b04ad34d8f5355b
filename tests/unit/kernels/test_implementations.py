"""Every instruction set of this processor computes what the plain meaning says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch.nn import functional

from cloister.model import rope
from cloister_kernels import pack, reference
from cloister_kernels.pack import Format

from .implementations import CACHES, attention, here, library, linear, unpack

Packed = tuple[Format, torch.Tensor]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(form: Format, rows: int, inputs: int) -> tuple[Packed, torch.Tensor]:
    """A packed matrix, and its weights as torchao's or GGUF's own package reads them."""
    random = rng(rows * inputs)
    if form in (Format.W4, Format.W8):
        half, groups = (8, inputs // 32) if form is Format.W4 else (128, 1)
        q = torch.randint(-half, half, (rows, inputs), dtype=torch.int8, generator=random)
        scale = torch.rand(rows, groups, generator=random) / 50 + 1e-3
        scale = scale.bfloat16() if form is Format.W4 else scale
        return pack.pack(q, scale), reference.dequantize(q, scale)
    kind = GGMLQuantizationType[form.name]
    block, size = GGML_QUANT_SIZES[kind]
    if form in (Format.Q4_K, Format.Q6_K):  # the package makes none: any bytes, scales of a size
        blocks = torch.randint(
            0, 256, (rows, inputs // block, size), dtype=torch.uint8, generator=random)
        scales = (torch.rand(rows, inputs // block, 2, generator=random) / 100).half()
        place, count = (0, 2) if form is Format.Q4_K else (208, 1)
        blocks[..., place:place + 2 * count] = scales[..., :count].contiguous().view(torch.uint8)
        data = blocks.flatten(1).numpy()
    else:
        data = quants.quantize(torch.randn(rows, inputs, generator=random).numpy(), kind)
    weights = torch.from_numpy(quants.dequantize(data, kind).astype(np.float32))
    return (form, pack.pack_gguf(form, torch.from_numpy(data), inputs)), weights


def gap(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize(("rows", "inputs"), [(16, 256), (37, 512), (5, 768), (1, 2048)])
def test_weights_are_read_as_their_format_says(form: Format, rows: int, inputs: int) -> None:
    packed, weights = matrix(form, rows, inputs)
    size = pack.tile_bytes(form, inputs)
    assert packed[1].shape == (-(-rows // 16), size)
    assert library().cloister_tile_bytes(int(form), inputs) == size
    for row in {0, rows // 2, rows - 1}:
        for name in here():
            assert torch.allclose(unpack(name, packed, inputs, row), weights[row], rtol=1e-6)


@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 70])
def test_a_linear_layer_multiplies_what_was_rounded(form: Format, length: int) -> None:
    rows, inputs = 37, 512
    packed, weights = matrix(form, rows, inputs)
    random = rng(length)
    x, bias = torch.randn(length, inputs, generator=random), torch.randn(rows, generator=random)
    residual = torch.randn(length, rows, generator=random)
    norm = torch.rand(inputs, generator=random)
    gates = torch.randn(length, 2 * inputs, generator=random)
    normed = functional.rms_norm(x, (inputs,), norm, 1e-6)
    left, right = gates.chunk(2, dim=1)
    gelu = functional.gelu(left, approximate="tanh")
    for name in here():
        for whole in (False, True):
            expected = reference.round_groups(x, whole=whole) @ weights.T
            got = linear(name, x, packed, rows, whole=whole, threads=1 + length % 3)
            assert gap(got, expected) < 1e-5
        got = linear(name, x, packed, rows, kind=1, norm=norm, bias=bias, residual=residual)
        assert gap(got, reference.round_groups(normed) @ weights.T + bias + residual) < 1e-3
        got = linear(name, gates, packed, rows, kind=2)
        assert gap(got, reference.round_groups(functional.silu(left) * right) @ weights.T) < 1e-3
        got = linear(name, gates, packed, rows, kind=3)
        assert gap(got, reference.round_groups(gelu * right) @ weights.T) < 1e-3


def test_rows_of_any_length_and_of_numbers_that_are_none() -> None:
    packed, weights = matrix(Format.W8, 20, 100)
    x = torch.randn(5, 100, generator=rng(1))
    x[1, 3], x[2, 99], x[3] = torch.nan, -torch.inf, 0
    x[4] *= 1e-38
    for name in here():
        got = linear(name, x, packed, 20)
        assert gap(got[0], weights @ reference.round_groups(x[:1])[0]) < 1e-5
        assert got[1:3].isnan().all() and not got[3:].any()
    assert reference.round_groups(x)[1:3].isnan().all()


def held(x_TGD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return keys or values as a cache holds them."""
    if dtype is not torch.int8:
        return x_TGD.to(dtype)
    scale = x_TGD.abs().amax(-1, keepdim=True) / 127
    return torch.cat([(x_TGD / scale).round().to(dtype), scale.view(dtype)], -1)


def given(cache: torch.Tensor) -> torch.Tensor:
    if cache.dtype is not torch.int8:
        return cache.float()
    return cache[..., :-4].float() * cache[..., -4:].contiguous().view(torch.float32)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [
    (16, 2, 128), (9, 3, 64), (4, 4, 32), (8, 1, 256), (3, 3, 80)])
@pytest.mark.parametrize(("length", "start"), [(1, 0), (1, 250), (3, 100), (70, 0), (128, 150)])
def test_attention(heads: int, kv_heads: int, size: int, length: int, start: int) -> None:
    context, random = 300, rng(length + start)
    cos, sin = (each.squeeze(1).contiguous() for each in rope.table(size, context, 1e4, None))
    norms = torch.rand(2, size, generator=random) + 0.5
    qkv = torch.randn(length, (heads + 2 * kv_heads) * size, generator=random)
    q, k, v = qkv.view(length, -1, size).split((heads, kv_heads, kv_heads), dim=1)
    place = slice(start, start + length)
    for softcap, window, normed in ((0.0, 0, True), (20.0, 33, False)):
        before = torch.randn(2, context, kv_heads, size, generator=random)
        tensors = {"cos": cos, "sin": sin}
        queries, keys = q, k
        if normed:
            tensors |= {"q_norm": norms[0], "k_norm": norms[1]}
            queries, keys = (functional.rms_norm(x, (size,), norm, 1e-6)
                             for x, norm in ((q, norms[0]), (k, norms[1])))
        queries, keys = (
            rope.rotate(x, cos[place, None], sin[place, None]) for x in (queries, keys))
        whole = before.clone()
        whole[0, place], whole[1, place] = keys, v
        expected = reference.attention(
            queries, *whole[:, :start + length], start, scale=size ** -0.5, softcap=softcap,
            window=window)
        for name in here():
            for dtype, bound in zip(CACHES, (2e-6, 1e-3, 0.02), strict=True):
                k_held, v_held = (held(x, dtype) for x in before.clone())
                got = attention(
                    name, qkv, k_held, v_held, tensors=tensors, threads=1 + length % 3, start=start,
                    softcap=softcap, window=window)
                assert gap(got, expected) < bound
                assert gap(given(k_held[place]), keys) < bound


@pytest.mark.parametrize("form", Format)
def test_a_row_has_the_same_bits_among_any_others(form: Format) -> None:
    packed, _ = matrix(form, 40, 512)
    x = torch.randn(70, 512, generator=rng(4))
    for name in here():
        whole = linear(name, x, packed, 40, threads=3)
        for count in (1, 2, 3, 5, 8, 30):
            assert linear(name, x[:count].contiguous(), packed, 40).equal(whole[:count])
            assert linear(name, x[-count:].contiguous(), packed, 40).equal(whole[-count:])


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (150, 0.0), (70, 9.0)])
def test_a_token_has_the_same_bits_however_a_text_is_divided(
    dtype: torch.dtype, window: int, softcap: float
) -> None:
    length, kv_heads, size, heads = 400, 2, 32, 6
    qkv = torch.randn(length, (heads + 2 * kv_heads) * size, generator=rng(5)) * 3
    for name in here():
        outs = []
        for step, threads in ((length, 1), (128, 2), (7, 3), (1, 1), (1, 4)):
            k, v = (held(torch.zeros(length, kv_heads, size), dtype) for _ in range(2))
            outs.append(torch.cat([
                attention(
                    name, qkv[at:at + step], k, v, tensors={}, threads=threads, start=at,
                    window=window, softcap=softcap)
                for at in range(0, length, step)]))
        for other in outs[1:]:
            assert other.equal(outs[0])
