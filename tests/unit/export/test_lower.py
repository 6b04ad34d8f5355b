"""A lowered program computes what the quantized decoder computes, for every feature of a layout."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from cloister.export.backends.xnnpack import program as xnnpack
from cloister.model.cache import KVCache
from cloister.model.config import Activation, ModelConfig, RopeScaling
from cloister.model.quantized import QuantizedEmbedding, QuantizedLinear, swap
from cloister.model.recipe import RECIPES, Recipe
from cloister.model.transformer import Decoder, RMSNorm
from cloister.quantize.rounding import quantize_weight
from cloister.tiers import Shape

pytestmark = pytest.mark.slow

SHAPE = Shape(
    vocab_size=97, hidden_size=128, layers=2, heads=4, kv_heads=2, head_size=32,
    feed_forward=256, context=64, tied=False,
)
CHUNK = 16
LAYOUTS = {
    "llama": ModelConfig(
        shape=SHAPE, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=16)
    ),
    "qwen-2.5": ModelConfig(shape=SHAPE, qkv_bias=True),
    "qwen-3": ModelConfig(shape=SHAPE, qk_norm=True),
    "all-biases": ModelConfig(shape=SHAPE, qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral": ModelConfig(shape=SHAPE, window=8, windowed_layers=(0, 1)),
    "smollm-3": ModelConfig(shape=SHAPE, no_rope_layers=(1,)),
    "gemma-2": ModelConfig(
        shape=SHAPE, activation=Activation.GELU_TANH, norm_offset=True, post_norms=True,
        attention_softcap=20.0, final_softcap=10.0, query_scale=0.2, window=8,
        windowed_layers=(0,), embedding_scale=128**0.5,
    ),
    "gemma-3": ModelConfig(
        shape=SHAPE, activation=Activation.GELU_TANH, norm_offset=True, post_norms=True,
        qk_norm=True, window=8, windowed_layers=(0,), local_rope_theta=1000.0,
        embedding_scale=128**0.5,
    ),
}


def quantized_decoder(config: ModelConfig, recipe: str) -> Decoder:
    """Random weights of about unit gain, so that a mistake in any part shows in the logits."""
    torch.manual_seed(0)
    plain = Decoder(config).eval()
    for module in plain.modules():
        if isinstance(module, RMSNorm):
            nn_weight = torch.rand_like(module.weight) * 0.5
            module.weight.data = nn_weight if module.offset else nn_weight + 0.5
        elif isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.data.normal_(std=0.5)
    decoder = Decoder(config).eval()
    swap(decoder, Recipe.parse(recipe))
    weights = dict(plain.named_parameters())
    for name, module in decoder.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            module.weight.q, module.weight.scale = quantize_weight(
                weights[f"{name}.weight"].detach(), module.scheme
            )
            if f"{name}.bias" in weights:
                module.bias = weights[f"{name}.bias"].detach()
        elif isinstance(module, RMSNorm):
            module.weight.data = weights[f"{name}.weight"].detach()
    return decoder


def run(decoder: Decoder, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the program (chunks, then one by one) and of the decoder, [1, T, V] each."""
    import executorch.kernels.quantized  # noqa: F401  # registers the embedding kernels
    from executorch.runtime import Runtime

    buffer = io.BytesIO()
    xnnpack(decoder, CHUNK, CHUNK, {}).write_to_file(buffer)
    program = Runtime.get().load_program(buffer.getvalue())
    forward, score = program.load_method("forward"), program.load_method("score")

    def call(method, first: int, last: int) -> torch.Tensor:
        part = tokens[:, first:last].contiguous()
        return method.execute((part, torch.tensor([first])))[0].clone()

    rows = [call(score, 0, CHUNK), call(score, CHUNK, CHUNK + 7)]
    rows += [call(forward, i, i + 1)[:, None] for i in range(CHUNK + 7, tokens.shape[1])]
    with torch.no_grad():
        expected = decoder(tokens, KVCache(decoder.config))
    return torch.cat(rows, dim=1), expected


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_program_agrees_with_the_decoder_past_a_window_and_across_both_methods(
    layout: str,
) -> None:
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    got, expected = run(quantized_decoder(LAYOUTS[layout], "8da4w-g32"), tokens)
    # One 8-bit step flipping in an activation moves the logits by parts in a thousand; a wrong
    # scale, layout, mask or norm moves them by tens of per cent.
    assert relative_error(got, expected) < 0.02


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_lowers_and_agrees(recipe: str) -> None:
    tokens = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(2))
    got, expected = run(quantized_decoder(LAYOUTS["llama"], recipe), tokens)
    assert relative_error(got, expected) < 0.02


def test_weights_lie_in_the_file_once_for_both_methods() -> None:
    buffer = io.BytesIO()
    config = replace(LAYOUTS["llama"], shape=replace(SHAPE, feed_forward=2048))
    decoder = quantized_decoder(config, "8da8w")
    xnnpack(decoder, CHUNK, CHUNK, {}).write_to_file(buffer)
    weights = sum(b.numel() * b.element_size() for b in decoder.state_dict().values())
    assert weights < len(buffer.getvalue()) < 1.2 * weights + 300_000
