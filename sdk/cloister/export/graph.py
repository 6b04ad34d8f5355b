"""The decoder as `torch.export` sees it: its methods over one set of KV buffers.

Shapes: T new positions, C context, H query heads, G KV heads, D head size, V vocabulary, E what a
position is read as: the hidden size, and where vectors of a picture attend to one another both ways
one more, which is 1 for these and 0 for all others.
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

__all__ = ["Attention", "Delegated", "KVAttend", "LayerCache", "Program", "first_position",
           "marked", "trace", "trace_decode", "trace_embed", "trace_sense", "traced"]


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
    ["ModelConfig", int, LayerCache, int, tuple[torch.Tensor, torch.Tensor, torch.Tensor],
     torch.Tensor | None],
    torch.Tensor,
]
"""A backend's attention: writes new keys and values into a layer's buffers, and attends:
queries [1, T, H, D], keys and values [1, T, G, D] -> [1, T, H, D]. Last which of the new positions
attend to all new ones, bool[T], or None."""


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

    def start(self, start_pos: torch.Tensor, length: int) -> int:
        """Return the first of `length` new positions."""
        return first_position(start_pos, length, self.config.shape.context)


def first_position(start_pos: torch.Tensor, length: int, context: int) -> int:
    """Return the first of `length` new positions, which the context must hold."""
    start: Any = start_pos[0].item()  # a symbol while it is traced
    torch._check(start >= 0)
    torch._check(start + length <= context)
    return start  # type: ignore[no-any-return]


class KVAttend:
    """The backend's attention on the KV buffers (see `cloister.model.cache.Attend`)."""

    def __init__(
        self, program: Program, start: int, both_ways_T: torch.Tensor | None = None
    ) -> None:
        self.program, self.start, self.both_ways_T = program, start, both_ways_T

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        """See `cloister.model.cache.Attend`."""
        state: Any = self.program.layers[layer]
        return self.program.attention(
            self.program.config, layer, state.attn, self.start, (q_BTHD, k_BTGD, v_BTGD),
            self.both_ways_T,
        )


class _Score(Program):
    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Return logits after every token, [1, T, V]."""
        start = self.start(start_pos, tokens.shape[1])
        return self.decoder.logits(self.decoder.hidden(tokens, start, KVAttend(self, start)))


class _Decode(Program):
    def __init__(self, decoder: Decoder, attention: Attention, *, both_ways: bool) -> None:
        super().__init__(decoder, attention)
        self.both_ways = both_ways

    def forward(self, x_1TE: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Return logits after every vector, [1, T, V]."""
        start, both_ways_T = self.start(start_pos, x_1TE.shape[1]), None
        if self.both_ways:
            x_1TE, both_ways_T = x_1TE[..., :-1], x_1TE[0, :, -1] > 0
        attend = KVAttend(self, start, both_ways_T)
        return self.decoder.logits(self.decoder.hidden_from(x_1TE, start, attend))


class _Embed(nn.Module):
    def __init__(self, decoder: Decoder, *, both_ways: bool) -> None:
        super().__init__()
        self.decoder, self.both_ways = decoder, both_ways

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the decoder reads of tokens, float32[1, T, E]."""
        x_1TE = self.decoder.embed_tokens(tokens)
        return marked(x_1TE, 0.0) if self.both_ways else x_1TE


class _Encode(nn.Module):
    def __init__(self, sense: nn.Module, mark: float | None) -> None:
        super().__init__()
        self.sense, self.mark = sense, mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the vectors of pixels or samples, float32[1, N, E]."""
        x_1NE: torch.Tensor = self.sense(x)
        return x_1NE if self.mark is None else marked(x_1NE, self.mark)


def marked(x_1TE: torch.Tensor, mark: float) -> torch.Tensor:
    """Append the feature that tells what attends both ways."""
    return torch.cat((x_1TE, torch.full_like(x_1TE[..., :1], mark)), dim=-1)


def trace(decoder: Decoder, attention: Attention, most: int) -> ExportedProgram:
    """Trace the method `score`, for 1 to `most` tokens at a time.

    `forward` differs in its last steps only; `lower.py` derives it.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    return traced(_Score(decoder, attention), tokens, most)


def trace_decode(
    decoder: Decoder, attention: Attention, most: int, *, both_ways: bool
) -> ExportedProgram:
    """Trace the method `text_decoder`, with a row for each vector, for 1 to `most` of them."""
    vectors = torch.zeros(1, 2, decoder.config.shape.hidden_size + both_ways)
    return traced(_Decode(decoder, attention, both_ways=both_ways), vectors, most)


def trace_embed(decoder: Decoder, most: int, *, both_ways: bool) -> ExportedProgram:
    """Trace the method `token_embedding`, for 1 to `most` tokens."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    return export(
        _Embed(decoder, both_ways=both_ways), (tokens,), dynamic_shapes=(_length(most),),
        strict=False)


def trace_sense(
    sense: nn.Module, example: torch.Tensor, mark: float | None, multiple: int = 0
) -> ExportedProgram:
    """Trace an encoder's method, for inputs as long as `example`, the longest.

    With `multiple` also for shorter ones, whose length is one of it.
    """
    steps = example.shape[-1] // multiple if multiple else 1
    dynamic = {2: multiple * Dim("steps", min=1, max=steps)} if steps > 1 else None
    return export(_Encode(sense, mark), (example,), dynamic_shapes=(dynamic,), strict=False)


def traced(program: nn.Module, positions: torch.Tensor, most: int) -> ExportedProgram:
    """Trace a method of positions and where they begin, for 1 to `most` of them."""
    start = torch.zeros(1, dtype=torch.int64)
    return export(
        program, (positions, start), dynamic_shapes=(_length(most), None), strict=False)


def _length(most: int) -> dict[int, Any]:
    # A length that is fixed at 1 gives a program whose attention is wrong (executorch 1.4.1).
    return {1: Dim("T", min=1, max=max(2, most))}
