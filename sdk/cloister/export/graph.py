"""The decoder as `torch.export` sees it: two methods over one set of KV buffers.

Shapes: T new positions, C context, H query heads, G KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence  # torch reads the annotations below
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

if TYPE_CHECKING:
    from cloister.model.config import ModelConfig
    from cloister.model.transformer import Decoder

__all__ = ["Attention", "Delegated", "LayerCache", "Program", "trace"]


@torch.library.custom_op("cloister::delegate", mutates_args=())
def _delegate(
    x: torch.Tensor, name: str, sizes: Sequence[int], constants: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Mark the place of a call of the delegate `name`, which `lower.py` inserts."""
    raise NotImplementedError(name)


@_delegate.register_fake
def _(
    x: torch.Tensor, name: str, sizes: Sequence[int],  # noqa: ARG001
    constants: Sequence[torch.Tensor],  # noqa: ARG001
) -> list[torch.Tensor]:
    return [x.new_empty(*x.shape[:-1], size) for size in sizes]


class Delegated(nn.Module):
    """A module that the delegate `name` computes: float32[1, T, K] -> [1, T, N] each.

    Each call gives it the same `constants`, too.
    """

    def __init__(
        self, name: str, sizes: tuple[int, ...], constants: Sequence[torch.Tensor] = ()
    ) -> None:
        super().__init__()
        self.name, self.sizes, self.count = name, sizes, len(constants)
        for number, constant in enumerate(constants):
            self.register_buffer(f"constant_{number}", constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Return one tensor for one size, else a list."""
        constants = [self.get_buffer(f"constant_{number}") for number in range(self.count)]
        out: list[torch.Tensor] = torch.ops.cloister.delegate(x, self.name, self.sizes, constants)
        return out[0] if len(out) == 1 else out


class LayerCache(nn.Module):
    """KV buffers of one layer, float32[1, C, G, D] each."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.shape
        size = (1, shape.context, shape.kv_heads, shape.head_size)
        self.register_buffer("k_cache", torch.zeros(size))
        self.register_buffer("v_cache", torch.zeros(size))


Attention = Callable[
    ["ModelConfig", int, LayerCache, int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    torch.Tensor,
]
"""A backend's attention: writes new keys and values into a layer's buffers, and attends:
queries [1, T, H, D], keys and values [1, T, G, D] -> [1, T, H, D]."""


class _LayerState(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = LayerCache(config)


class Program(nn.Module):
    """The part that both methods share: the decoder, and the KV buffers of every layer."""

    def __init__(self, decoder: Decoder, attention: Attention) -> None:
        super().__init__()
        self.decoder, self.attention = decoder, attention
        self.config = decoder.config
        # Named like the decoder's own modules: layers.0.attn.k_cache.
        self.layers = nn.ModuleList(_LayerState(self.config) for _ in decoder.layers)

    def rows(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of the new tokens, float32[1, T, hidden]."""
        start: Any = start_pos[0].item()  # a symbol while it is traced
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= self.config.shape.context)
        return self.decoder.hidden(tokens, start, _Attend(self, start))


class _Attend:
    """The backend's attention on the KV buffers (see `cloister.model.cache.Attend`)."""

    def __init__(self, program: Program, start: int) -> None:
        self.program, self.start = program, start

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        state: Any = self.program.layers[layer]
        return self.program.attention(
            self.program.config, layer, state.attn, self.start, (q_BTHD, k_BTGD, v_BTGD)
        )


class _Score(Program):
    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Return logits after every token, [1, T, V]."""
        logits: torch.Tensor = self.decoder.logits(self.rows(tokens, start_pos))
        return logits


def trace(decoder: Decoder, attention: Attention, most: int) -> ExportedProgram:
    """Trace the method `score`, for 1 to `most` tokens at a time.

    `forward` differs in its last steps only; `lower.py` derives it.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int64)
    # A length that is fixed at 1 gives a program whose attention is wrong (executorch 1.4.1).
    dynamic = ({1: Dim("T", min=1, max=max(2, most))}, None)
    return export(_Score(decoder, attention), (tokens, start), dynamic_shapes=dynamic, strict=False)
