"""A rotated model computes what it computed."""

from __future__ import annotations

import pytest
import torch

from cloister.errors import QuantizationError
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.quantize.rotate import Rotation, orthogonal
from cloister.tiers import Shape

SHAPE = Shape(vocab_size=97, hidden_size=48, layers=2, heads=4, kv_heads=2, head_size=12,
              feed_forward=80, context=32, tied=False)


@pytest.mark.parametrize("size", [1, 9, 48, 64])
def test_the_matrix_is_orthogonal_and_spreads_one_channel_over_the_rest(size: int) -> None:
    matrix = orthogonal(size, torch.Generator().manual_seed(1))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    if size == 64:
        assert matrix.abs().max() == matrix.abs().min() == 64**-0.5


@pytest.mark.parametrize("config", [
    ModelConfig(shape=SHAPE),
    ModelConfig(shape=SHAPE, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True),
    ModelConfig(shape=SHAPE, norm_offset=True, embedding_scale=3.0, window=5,
                windowed_layers=(0,), no_rope_layers=(1,)),
], ids=["llama", "biases and norms of heads", "offset, scale and window"])
def test_a_rotated_model_gives_the_same_logits(config: ModelConfig) -> None:
    torch.manual_seed(0)
    plain = Decoder(config).eval()
    for parameter in plain.parameters():
        parameter.data.normal_(std=0.2)
    values = plain.state_dict()
    rotation = Rotation(config, values.__getitem__)
    rotated = Decoder(config).eval()
    rotated.load_state_dict({name: rotation(name) for name in values})
    tokens_BT = torch.randint(0, 97, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(rotated(tokens_BT), plain(tokens_BT), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rotated.embed.weight, plain.embed.weight)


def test_norms_behind_the_layers_are_refused() -> None:
    config = ModelConfig(shape=SHAPE, post_norms=True, norm_offset=True)
    with pytest.raises(QuantizationError, match="norms behind"):
        Rotation(config, {}.__getitem__)
