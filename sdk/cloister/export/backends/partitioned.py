"""Core ML and Vulkan: ExecuTorch's own partitioners choose what their delegates compute.

Neither runs where bundles are made, so what is proved is the graph that they are given: it runs in
torch, and gives the checkpoint's logits. Weights are those of the checkpoint, activations are not
rounded.

Shapes: T new positions, C context, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

from cloister.backend import COREML
from cloister.export import _executorch
from cloister.model.quantized import QuantizedEmbedding, QuantizedLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cloister.export._executorch import ExecutorchProgramManager
    from cloister.model.config import ModelConfig
    from cloister.model.transformer import Decoder

__all__ = ["chunk_of", "lower", "outside", "score", "trace"]

_HIDDEN = -1e4  # of a masked score: Vulkan has no infinity among scalars, and it fits in 16 bits


def chunk_of(backend: str, chunk: int) -> int:
    """Return the most tokens of a call: one with Core ML, whose shapes are fixed."""
    return 1 if backend == COREML.name else chunk


def trace(decoder: Decoder, chunk: int) -> ExportedProgram:
    """Trace the method `forward` of a quantized `decoder`, for 1 to `chunk` tokens.

    `decoder` is changed: its matrices become those that the partitioners know.
    """
    for name, module in list(decoder.named_modules()):
        if isinstance(module, QuantizedLinear):
            decoder.set_submodule(name, _Linear(module))
        elif isinstance(module, QuantizedEmbedding):
            decoder.set_submodule(name, _Embedding(module))
    step = _Step(decoder).eval().requires_grad_(False)
    tokens = torch.zeros(1, min(2, chunk), dtype=torch.int64)
    dynamic = ({1: Dim("T", min=1, max=chunk)}, None) if chunk > 1 else None
    with torch.no_grad():
        return export(
            step, (tokens, torch.zeros(1, dtype=torch.int64)), dynamic_shapes=dynamic,
            strict=False)


def score(traced: ExportedProgram, ids: list[int]) -> torch.Tensor:
    """Return what the traced graph, run by torch, gives after each of `ids`, float32[T, V]."""
    step = traced.module()
    with torch.no_grad():
        rows = [step(torch.tensor([[id_]]), torch.tensor([start]))
                for start, id_ in enumerate(ids)]
    return torch.cat(rows)


def lower(
    traced: ExportedProgram, backend: str, constants: Mapping[str, object]
) -> ExecutorchProgramManager:
    """Return the program of `traced` with all that `backend` takes in its delegates.

    Raises:
        ExportError: what the backend's exporter needs is not installed; it says what.
    """
    return _executorch.partition(traced, backend, constants)


def outside(manager: ExecutorchProgramManager) -> tuple[int, dict[str, int]]:
    """Return the number of delegate calls, and how often each operator is called beside them."""
    plan = manager.executorch_program.execution_plan[0]
    calls = Counter(
        f"{plan.operators[call.op_index].name}"
        for each in plan.chains[0].instructions
        if hasattr(call := each.instr_args, "op_index"))
    delegated = sum(
        hasattr(each.instr_args, "delegate_index") for each in plan.chains[0].instructions)
    return delegated, dict(sorted(calls.items()))


class _Weight(nn.Module):
    """Integers and scales of a matrix, dequantized by the operator that the partitioners know."""

    def __init__(self, source: QuantizedLinear | QuantizedEmbedding) -> None:
        super().__init__()
        q, scale = source.weight.q, source.weight.scale.float()
        self.bound = 2 ** (source.scheme.bits - 1)
        self.block = [1, q.shape[1] // scale.shape[1]]
        self.register_buffer("q", q)
        # One scale a row is a vector, or Vulkan does not see it.
        self.register_buffer("scale", scale.squeeze(1) if scale.shape[1] == 1 else scale)
        self.register_buffer("zero", torch.zeros_like(self.get_buffer("scale"), dtype=torch.int8))

    def forward(self) -> torch.Tensor:
        """Return the weights, float32[N, K]."""
        weights: torch.Tensor = _executorch.dequantize(
            self.get_buffer("q"), self.block, self.get_buffer("scale"), self.get_buffer("zero"),
            torch.int8, -self.bound, self.bound - 1, output_dtype=torch.float32)
        return weights


class _Linear(nn.Module):
    def __init__(self, source: QuantizedLinear) -> None:
        super().__init__()
        self.weight = _Weight(source)
        self.register_buffer("bias", source.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight(), self.bias)  # type: ignore[arg-type]


class _Embedding(nn.Module):
    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        self.weight = _Weight(source)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.weight())


class _Step(nn.Module):
    """The method `forward`: positions are a tensor all the way, since no symbol can be lowered."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, shape = decoder, decoder.config.shape
        size = (1, shape.kv_heads, shape.context, shape.head_size)
        for layer in range(shape.layers):
            self.register_buffer(f"k_cache_{layer}", torch.zeros(size))
            self.register_buffer(f"v_cache_{layer}", torch.zeros(size))
        self.register_buffer("columns", torch.arange(shape.context)[None, :])
        # A tensor of positions takes the place of the number that a plain decoder is given.
        decoder.cos_sin = self._cos_sin  # type: ignore[method-assign, assignment]

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Return logits after the last token, int64[1, T] -> float32[1, V]."""
        positions: Any = start_pos if tokens.shape[1] == 1 else (
            start_pos + torch.arange(tokens.shape[1]))
        attend = _Attend(self, positions)
        hidden = self.decoder.hidden(tokens, positions, attend)
        return self.decoder.logits(hidden[:, -1:])[:, 0]

    def _cos_sin(
        self, layer: int, positions: torch.Tensor, _: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decoder, config = self.decoder, self.decoder.config
        if config.local_rope_theta is not None and layer in config.windowed_layers:
            return decoder.local_cos[positions], decoder.local_sin[positions]
        return decoder.cos[positions], decoder.sin[positions]


class _Attend:
    """Attention in plain operators (see `cloister.model.cache.Attend`)."""

    def __init__(self, step: _Step, positions: torch.Tensor) -> None:
        self.step, self.positions = step, positions
        self.config: ModelConfig = step.decoder.config

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        config, shape = self.config, self.config.shape
        k, v = (
            cache.index_copy_(2, self.positions, new.transpose(1, 2)).unsqueeze(2).expand(
                -1, -1, shape.heads // shape.kv_heads, -1, -1).flatten(1, 2)
            for cache, new in ((self.step.get_buffer(f"k_cache_{layer}"), k_BTGD),
                               (self.step.get_buffer(f"v_cache_{layer}"), v_BTGD)))
        scores = q_BTHD.transpose(1, 2) @ k.transpose(2, 3) * config.attention_scale
        if (cap := config.attention_softcap) is not None:
            scores = cap * torch.tanh(scores / cap)
        query, window = self.positions[:, None], config.window_of(layer)
        columns = self.step.get_buffer("columns")
        seen = columns <= query
        if window is not None:
            seen = seen & (columns > query - window)
        out = (scores + torch.where(seen, 0.0, _HIDDEN)).softmax(dim=-1) @ v
        return out.transpose(1, 2)
