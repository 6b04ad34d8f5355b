"""The plain meaning of each operator is torchao's, to the bit."""

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from cloister.quantize.qat import round_rows
from cloister_kernels import reference


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_linear_layer_computes_what_torchao_computes(bits: int) -> None:
    torch.manual_seed(bits)
    layer, x = nn.Linear(256, 128), torch.randn(50, 256) * torch.logspace(-3, 3, 50)[:, None]
    quantize_(layer, Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4 if bits == 4 else torch.int8,
        weight_granularity=PerGroup(32) if bits == 4 else PerAxis(0),
        weight_scale_dtype=torch.bfloat16 if bits == 4 else torch.float32,
    ))
    weight = layer.weight
    ours = reference.linear_8da(x, weight.qdata, weight.scale, layer.bias)
    assert torch.equal(ours, layer(x))


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(reference.fake_quantize_rows(torch.zeros(3, 8)), torch.zeros(3, 8))


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e7])
def test_rows_are_rounded_alike_whatever_their_size_and_as_in_training(size: float) -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * size
    rounded = reference.fake_quantize_rows(x)
    assert float((rounded - x).abs().max() / x.abs().max()) < 0.01
    assert torch.equal(rounded, round_rows(x))


def test_rounding_a_row_moves_no_entry_by_more_than_half_a_step() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(7))
    step = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / 255
    error = (reference.fake_quantize_rows(x) - x).abs().amax(-1)
    assert (error <= step * 1.001).all()


def test_packing_keeps_the_even_input_in_the_half_that_each_kernel_reads() -> None:
    q = torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8)
    assert reference.pack_4bit(q).tolist() == [[0xF0, 0x98]]
    assert reference.pack_4bit_embedding(q).tolist() == [[0x0F, 0x89]]
