"""Quantization-aware training: a decoder that computes as if it were quantized, and learns to.

Shapes: N rows, K inputs, M positions.

The decoder rounds weights and activations to the bit as torchao's fake quantizers do by
their affine choice, which is the one that `apply.quantize` makes: what comes out of training is
quantized to exactly what was trained. The rounding is done here because torchao's takes 2 to 4
times as long on a processor, a clamp's gradient most of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from cloister.errors import GroupSizeError
from cloister.model.checkpoint import expected_tensors
from cloister_kernels.reference import LEAST_SCALE

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.config import ModelConfig
    from cloister.model.recipe import Recipe, Scheme
    from cloister.model.transformer import Decoder

__all__ = ["RoundedEmbedding", "RoundedLinear", "check_groups", "round_rows", "round_weight",
           "rounded", "untied"]


def rounded(
    decoder: Decoder, recipe: Recipe, scale_of: Callable[[str], torch.Tensor] | None = None
) -> Decoder:
    """Make `decoder` round its weights and activations as `recipe` does, and return it.

    With `scale_of` the scales are those that it gives for the name of a tensor, and stay;
    otherwise they follow the largest entry of each group.

    Embedding and head must have weights of their own, since they are quantized separately.
    Parameters keep their names, so that the trained ones can be written to a checkpoint and
    quantized. Train it in float32: autocast changes the activations that are rounded, and with
    them the logits. torch.compile may be used: weights are rounded the same.

    Raises:
        GroupSizeError: a group does not divide a layer's inputs.
    """
    check_groups(expected_tensors(decoder.config), recipe)
    for name, module in list(decoder.named_modules()):
        scheme = recipe.scheme_of(f"{name}.weight")
        if scheme is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        scale = None if scale_of is None else scale_of(f"{name}.weight")
        decoder.set_submodule(name, (
            RoundedLinear(module, scheme, scale) if isinstance(module, nn.Linear)
            else RoundedEmbedding(module, scheme, scale)))
    return decoder


def untied(config: ModelConfig) -> ModelConfig:
    """Return `config` with a head of its own."""
    return replace(config, shape=replace(config.shape, tied=False))


def check_groups(tensors: dict[str, tuple[int, ...]], recipe: Recipe) -> None:
    """Raise GroupSizeError unless every group of `recipe` divides its layer's inputs."""
    for name, shape in tensors.items():
        scheme = recipe.scheme_of(name)
        if scheme is not None and scheme.group is not None and shape[1] % scheme.group:
            raise GroupSizeError(
                f"Layer {name.removesuffix('.weight')} has {shape[1]} inputs, which groups of "
                f"{scheme.group} do not divide; choose another recipe."
            )


class RoundedLinear(nn.Linear):
    """Linear layer with the parameters of `plain`, on rounded activations and weights."""

    scale_NC: torch.Tensor | None

    def __init__(
        self, plain: nn.Linear, scheme: Scheme, scale_NC: torch.Tensor | None = None
    ) -> None:
        super().__init__(
            plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta"
        )
        self.weight, self.bias, self.scheme = plain.weight, plain.bias, scheme
        self.register_buffer("scale_NC", scale_NC, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32[..., K] -> float32[..., N]."""
        weight_NK = round_weight(self.weight, self.scheme, self.scale_NC)
        return functional.linear(round_rows(x), weight_NK, self.bias)


class RoundedEmbedding(nn.Embedding):
    """Embedding with the parameters of `plain`, of rounded rows."""

    scale_NC: torch.Tensor | None

    def __init__(
        self, plain: nn.Embedding, scheme: Scheme, scale_NC: torch.Tensor | None = None
    ) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, device="meta")
        self.weight, self.scheme = plain.weight, scheme
        self.register_buffer("scale_NC", scale_NC, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map int64[...] -> float32[..., K]."""
        # No scale reaches past its row, so only those that are looked up need rounding.
        scale = None if self.scale_NC is None else self.scale_NC[tokens]
        return round_weight(functional.embedding(tokens, self.weight), self.scheme, scale)


def round_weight(
    weight: torch.Tensor, scheme: Scheme, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize and dequantize `weight`, float32[..., K] -> float32[..., K].

    By `scale`, [..., C], or else equal to the bit to what `rounding.quantize_weight` gives. The
    gradient is that of the identity, and zero for entries beyond the largest integer.
    """
    groups = weight if scheme.group is None else weight.unflatten(-1, (-1, scheme.group))
    half = 2.0 ** (scheme.bits - 1)
    with torch.no_grad():
        if scale is None:
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = (torch.maximum(-low, high) / (half - 0.5)).clamp(min=LEAST_SCALE)
            inverse = 1.0 / scale
            if scheme.scale_bits == 16:  # then torchao's inverse has 16 bits, too
                scale = _bfloat16(scale)
                inverse = _bfloat16(1.0 / scale)
        else:
            scale = scale.float() if scheme.group is None else scale.float().unsqueeze(-1)
            inverse = 1.0 / scale
    return _round(groups, inverse, scale, None, -half, half - 1).view_as(weight)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """Round each row to 8 bits and back, float32[..., K] -> float32[..., K].

    Asymmetric, with zero represented exactly: the dynamic quantization of activations. The
    gradient is that of the identity, and zero for entries beyond the 8 bits.
    """
    with torch.no_grad():
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=LEAST_SCALE)
        zero = -128 - (low / scale).round()
    return _round(x, 1.0 / scale, scale, zero, -128.0, 127.0)


def _bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Round positive float32 to the nearest bfloat16, ties to even, still float32.

    By its bits: what torch.compile makes of a cast to bfloat16 and back leaves the rounding out
    (torch/_inductor/config.py: emulate_precision_casts), and then every weight is another.
    """
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000).view(torch.float32)


def _round(
    x: torch.Tensor, inverse: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None,
    least: float, most: float,
) -> torch.Tensor:
    """Round to integers from `least` to `most`, and back."""
    rounded: torch.Tensor = _Round.apply(  # type: ignore[no-untyped-call]
        x, inverse, scale, zero, least, most
    )
    return rounded


class _Round(torch.autograd.Function):
    """`_round`, straight through for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, inverse: torch.Tensor, scale: torch.Tensor,
        zero: torch.Tensor | None, least: float, most: float,
    ) -> torch.Tensor:
        integers = (x * inverse).round_()
        if zero is not None:
            integers += zero
        ctx.save_for_backward(integers)
        ctx.bounds = least - 0.5, most + 0.5
        clamped = integers.clamp(least, most)
        if zero is not None:
            clamped -= zero
        clamped *= scale
        return clamped

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # One pass, where a comparison and a product take two and a copy. It lets through what
        # lies strictly within its bounds, hence the halves.
        (integers,) = ctx.saved_tensors
        passed = torch.ops.aten.hardtanh_backward(gradients[0], integers, *ctx.bounds)
        return passed, None, None, None, None, None
