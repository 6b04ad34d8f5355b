"""The encoder reads patches, mel frames and lines, at any width up to its longest, and exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.export import Dim, export

from cloister.errors import SettingError
from cloister.model.encoder import Encoder, EncoderBlock, EncoderShape, Stem, sinusoids

SIZES = {"hidden_size": 32, "layers": 2, "heads": 4, "feed_forward": 48}
SHAPES = {
    "patches": EncoderShape(
        stem=Stem.PATCHES, rows=24, channels=3, patch=8, positions=12, activation="gelu_tanh",
        **SIZES),
    "frames": EncoderShape(
        stem=Stem.CONVOLUTIONS_1D, rows=20, positions=40, key_bias=False, **SIZES),
    "lines": EncoderShape(
        stem=Stem.CONVOLUTIONS_2D, rows=16, halvings=2, width=8, positions=40, **SIZES),
    "convolving": EncoderShape(
        stem=Stem.CONVOLUTIONS_2D, rows=16, halvings=2, width=8, positions=40, kernel=7, **SIZES),
}


def encoder(shape: EncoderShape) -> Encoder:
    made = Encoder(shape)
    made.initialize(7)
    return made.eval()


def some(shape: EncoderShape, columns: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(columns)
    return torch.randn(1, shape.channels, shape.rows, columns, generator=rng)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_every_input_up_to_the_longest_has_the_positions_that_the_shape_counts(name: str) -> None:
    shape = SHAPES[name]
    made = encoder(shape)
    for columns in (shape.stride, 2 * shape.stride + 1, shape.columns):
        out = made(some(shape, columns))
        assert out.shape == (1, shape.positions_of(columns), 32)
        assert out.std() > 0.5
    assert shape.positions_of(shape.columns) == shape.positions
    with pytest.raises(RuntimeError):
        made(some(shape, shape.columns + shape.stride))


@torch.no_grad()
def test_a_narrow_picture_keeps_the_stored_positions_of_its_rows_and_columns() -> None:
    shape = SHAPES["patches"]  # 3 rows of 4 patches
    made = encoder(shape)
    made.stem.convolution.weight.zero_()
    made.layers = torch.nn.ModuleList()
    expected = made.norm(made.positions[[0, 1, 4, 5, 8, 9]])
    assert torch.equal(made(some(shape, 16))[0], expected)


@torch.no_grad()
def test_a_picture_encoder_exports() -> None:
    made, x = encoder(SHAPES["patches"]), some(SHAPES["patches"], 32)
    assert (export(made, (x,), strict=False).module()(x) - made(x)).abs().max() < 1e-5


@torch.no_grad()
def test_a_convolution_mixes_a_position_with_its_neighbours_only() -> None:
    block = EncoderBlock(SHAPES["convolving"])
    block.attn.o.weight.zero_()
    block.attn.o.bias.zero_()
    x_BND = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    other_BND = x_BND.clone()
    other_BND[0, 10, 0] += 1  # one entry: the norm takes away what all have in common
    changed_N = ((block(x_BND) - block(other_BND)).abs().amax(-1) > 0)[0]
    assert changed_N.nonzero().flatten().tolist() == list(range(7, 14))


@pytest.mark.parametrize("name", ["frames", "lines", "convolving"])
@torch.no_grad()
def test_an_exported_encoder_reads_any_width(name: str) -> None:
    shape = SHAPES[name]
    made = encoder(shape)
    least, most = 2, shape.columns // shape.stride
    strides = Dim("strides", min=least, max=most)
    program = export(
        made, (some(shape, shape.stride * 3),), strict=False,
        dynamic_shapes=({3: shape.stride * strides},)).module()
    for count in (least, most):
        x = some(shape, shape.stride * count)
        assert (program(x) - made(x)).abs().max() < 1e-5


@pytest.mark.parametrize(("change", "complaint"), [
    ({"heads": 5}, "multiple of 5"), ({"rows": 0}, "rows is 0"), ({"patch": 0}, "patch is 0"),
    ({"rows": 25}, "multiple of 8"), ({"positions": 13}, "multiple of 3"),
    ({"halvings": 2}, "leave it 0"), ({"norm_eps": float("nan")}, "norm_eps"),
    ({"activation": "relu"}, "relu is not known"), ({"kernel": 7}, "kernel is 7"),
])
def test_a_shape_out_of_bounds_is_refused_by_name(
    change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(SettingError, match=complaint):
        replace(SHAPES["patches"], **change)


def test_a_kernel_has_a_middle() -> None:
    with pytest.raises(SettingError, match="kernel is 4"):
        replace(SHAPES["convolving"], kernel=4)


def test_mel_frames_have_one_channel() -> None:
    with pytest.raises(SettingError, match="channels is 2"):
        replace(SHAPES["frames"], channels=2)


def test_sinusoids_tell_every_position_from_every_other() -> None:
    table = sinusoids(100, 33)
    assert table.shape == (100, 33)
    assert (torch.cdist(table, table) + torch.eye(100)).min() > 0.1
