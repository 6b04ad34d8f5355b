"""The decoder as `torch.export` sees it: two methods over one set of KV buffers.

Shapes: T new positions, C context, H query heads, G KV heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  # torch reads the annotations below
from typing import TYPE_CHECKING, Any

import torch

# Registers llama::update_cache and llama::custom_sdpa.
from executorch.extension.llm.custom_ops import custom_ops as custom_ops
from torch import nn
from torch.export import Dim, ExportedProgram, export

from cloister.model.cache import visible

if TYPE_CHECKING:
    from cloister.model.config import ModelConfig
    from cloister.model.transformer import Decoder

__all__ = ["Delegated", "Program", "trace"]


@torch.library.custom_op("cloister::delegate", mutates_args=())
def _delegate(x: torch.Tensor, name: str, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Stands for a call of the delegate `name`; `lower.py` puts the call in its place."""
    raise NotImplementedError(name)


@_delegate.register_fake
def _(x: torch.Tensor, name: str, sizes: Sequence[int]) -> list[torch.Tensor]:  # noqa: ARG001
    return [x.new_empty(*x.shape[:-1], size) for size in sizes]


class Delegated(nn.Module):
    """A module whose computation the delegate `name` does: float32[1, T, K] -> [1, T, N] each."""

    def __init__(self, name: str, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.sizes = name, sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """One tensor for one size, else a list."""
        out: list[torch.Tensor] = torch.ops.cloister.delegate(x, self.name, self.sizes)
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


class _LayerState(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = LayerCache(config)


class Program(nn.Module):
    """What both methods share: the decoder, and the KV buffers of every layer."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = decoder.config
        # Named like the decoder's own modules: layers.0.attn.k_cache.
        self.layers = nn.ModuleList(_LayerState(self.config) for _ in decoder.layers)

    def rows(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Hidden rows of the new tokens, float32[1, T, hidden]."""
        start: Any = start_pos[0].item()  # a symbol while it is traced
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= self.config.shape.context)
        return self.decoder.hidden(tokens, start, _Attend(self, start))


class _Attend:
    """Writes into the KV buffers, then attends to them (see `cloister.model.cache.Attend`)."""

    def __init__(self, program: Program, start: int) -> None:
        self.program, self.start = program, start

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        config, start = self.program.config, self.start
        state: Any = self.program.layers[layer]
        k_cache, v_cache = state.attn.k_cache, state.attn.v_cache
        torch.ops.llama.update_cache(k_BTGD, k_cache, start)
        torch.ops.llama.update_cache(v_BTGD, v_cache, start)
        window, softcap = config.window_of(layer), config.attention_softcap
        scale = config.attention_scale
        if window is None and softcap is None:
            out: torch.Tensor = torch.ops.llama.custom_sdpa(
                q_BTHD, k_cache, v_cache, start, None, 0.0, True, scale
            )
            return out
        seen = visible(q_BTHD.shape[1], config.shape.context, start, window)
        mask = torch.where(seen, 0.0, float("-inf"))
        if softcap is None:
            # With is_causal=True beside a mask the kernel returns garbage (executorch 1.4.1).
            out = torch.ops.llama.custom_sdpa(
                q_BTHD, k_cache, v_cache, start, mask, 0.0, False, scale
            )
            return out
        # The kernel has no soft-capping: plain products, one KV head's queries at a time.
        shape = config.shape
        q = q_BTHD.transpose(1, 2).reshape(1, shape.kv_heads, -1, q_BTHD.shape[1], shape.head_size)
        k, v = (x.transpose(1, 2).unsqueeze(2) for x in (k_cache, v_cache))
        scores = softcap * torch.tanh(q @ k.transpose(3, 4) * (scale / softcap)) + mask
        out = scores.softmax(dim=-1) @ v
        return out.flatten(1, 2).transpose(1, 2)


class _Score(Program):
    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Logits after every token, [1, T, V]."""
        logits: torch.Tensor = self.decoder.logits(self.rows(tokens, start_pos))
        return logits


def trace(decoder: Decoder, chunk: int) -> ExportedProgram:
    """The method `score`, for 1 to `chunk` tokens at a time.

    `forward` differs in its last steps only; `lower.py` derives it, since tracing and converting
    it separately would take as long again.
    """
    tokens = torch.zeros(1, min(2, chunk), dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int64)
    dynamic = ({1: Dim("T", min=1, max=chunk)} if chunk > 1 else None, None)
    return export(_Score(decoder), (tokens, start), dynamic_shapes=dynamic, strict=False)
