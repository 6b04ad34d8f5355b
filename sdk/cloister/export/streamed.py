"""The decoder of a checkpoint whose weights are in memory only while their module computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloister.backend import CLOISTER, XNNPACK
from cloister.model.quantized import PARTS, QuantizedLinear, swap
from cloister.model.transformer import Decoder
from cloister_kernels import reference

if TYPE_CHECKING:
    from cloister.model.checkpoint import Checkpoint

__all__ = ["bare", "streamed"]


def bare(source: Checkpoint) -> Decoder:
    """Return the decoder of `source` without its weights."""
    metadata = source.metadata
    with torch.device("meta"):
        decoder = Decoder(metadata.config)
        if metadata.schemes is not None:
            swap(decoder, metadata.schemes)
    return decoder


def streamed(source: Checkpoint, backend: str = XNNPACK.name) -> Decoder:
    """Return the decoder of `source`, plain weights in float32, for inference.

    Embedding, layers, last norm and head each read their weights when they are called, and forget
    them afterwards. Activations are rounded as programs for `backend` round them.
    """
    metadata, decoder = source.metadata, bare(source)
    if backend == CLOISTER.name:
        for module in decoder.modules():
            if isinstance(module, QuantizedLinear):
                module.rounded = reference.round_groups
    tied = metadata.config.shape.tied
    parts = {"embed": decoder.embed, "norm": decoder.norm, "head": decoder.head}
    parts |= {f"layers.{number}": block for number, block in enumerate(decoder.layers)}
    for name, module in parts.items():
        stored = "embed" if tied and name == "head" else name
        module.register_forward_pre_hook(_Reader(source, stored))
        module.register_forward_hook(_forget)
    return decoder.eval()


class _Reader:
    """Fills a module with the tensors of a checkpoint whose names begin with `name`."""

    def __init__(self, source: Checkpoint, name: str) -> None:
        self.source, self.name = source, name

    def __call__(self, module: torch.nn.Module, _: object) -> None:
        tensors = {}
        for name in module.state_dict():
            tensor = self.source.tensor(f"{self.name}.{name}")
            tensors[name] = tensor if name.endswith(PARTS) else tensor.float()
        module.load_state_dict(tensors, assign=True)


def _forget(module: torch.nn.Module, *_: object) -> None:
    module.to("meta")
