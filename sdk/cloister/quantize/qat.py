"""Quantization-aware training: a decoder that computes as if it were quantized, and learns to.

The prepared decoder rounds weights and activations with torchao's affine choice, which is the one
that `apply.quantize` makes: what comes out of training is quantized to exactly what was trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from cloister.model.checkpoint import expected_tensors
from cloister.model.transformer import Decoder
from cloister.quantize.apply import check_groups

if TYPE_CHECKING:
    from cloister.model.recipe import Recipe, Scheme

__all__ = ["prepare"]


def prepare(decoder: Decoder, recipe: Recipe) -> Decoder:
    """A copy of `decoder` in float32 that computes what its quantized self will.

    Embedding and head have weights of their own in it, tied or not, since they are quantized
    apart. Parameters keep their names, so that the trained ones can be written to a checkpoint and
    quantized. Train it in float32: under autocast it rounds other numbers.

    Raises:
        GroupSizeError: a group does not divide a layer's inputs.
    """
    config = replace(decoder.config, shape=replace(decoder.config.shape, tied=False))
    check_groups(expected_tensors(config), recipe)
    prepared = Decoder(config)
    prepared.load_state_dict(decoder.state_dict())
    prepared.to(decoder.embed.weight.device)
    by_kind: dict[tuple[Scheme, bool], list[nn.Module]] = {}
    for name, module in prepared.named_modules():
        scheme = recipe.scheme_of(f"{name}.weight")
        if scheme is not None and isinstance(module, nn.Linear | nn.Embedding):
            by_kind.setdefault((scheme, isinstance(module, nn.Linear)), []).append(module)
    for (scheme, linear), modules in by_kind.items():
        chosen = {id(module) for module in modules}
        quantize_(
            prepared,
            QATConfig(
                activation_config=_ACTIVATIONS if linear else None,
                weight_config=_weights(scheme), step="prepare",
            ),
            filter_fn=lambda module, name, chosen=chosen: id(module) in chosen,
        )
    return prepared


_ACTIVATIONS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)


def _weights(scheme: Scheme) -> IntxFakeQuantizeConfig:
    if scheme.group is None:
        return IntxFakeQuantizeConfig(torch.int8, "per_channel")
    return IntxFakeQuantizeConfig(
        torch.int4,  # type: ignore[attr-defined]  # missing in torch's stubs
        group_size=scheme.group, is_symmetric=True,
        scale_precision=torch.bfloat16,  # as the exported weights keep them
    )
