"""XNNPACK: a quantized decoder's matrices become delegates, its attention ExecuTorch's kernels.

Shapes: T new positions, C context, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cloister.backend import XNNPACK
from cloister.export.backends.xnnpack_graph import Delegates
from cloister.export.backends.xnnpack_sense import delegate_sense
from cloister.export.graph import trace, trace_decode, trace_embed, trace_sense
from cloister.export.lower import lower
from cloister.model.cache import visible
from cloister.model.config import Activation
from cloister.model.transformer import Decoder
from cloister.progress import silent
from cloister_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from cloister.export._executorch import ExecutorchProgramManager
    from cloister.export.backends.xnnpack_graph import Subgraph, Value
    from cloister.export.graph import LayerCache
    from cloister.export.media import Media
    from cloister.model.config import ModelConfig
    from cloister.model.quantized import QuantizedEmbedding
    from cloister.model.transformer import RMSNorm
    from cloister.progress import Progress

__all__ = ["attention", "program"]


def program(
    decoder: Decoder, chunk: int, most: int, constants: Mapping[str, object],
    progress: Progress = silent, media: Media | None = None,
) -> ExecutorchProgramManager:
    """Return the program of a quantized `decoder`, for 1 to `chunk` tokens a call of `score`.

    `forward` takes up to `most`. `constants` are those of `cloister.export.lower.lower`; `progress`
    is called with the name of each stage (see `cloister.export.write.STAGES`). With `media` it has
    the methods for them, too.
    """
    progress("pack")
    twin, delegates = _delegate(decoder, chunk)
    progress("trace")
    score = trace(twin, attention, chunk)
    traced = {"forward": score if most == chunk else trace(twin, attention, most), "score": score}
    if media is not None:
        traced |= {
            "text_decoder": trace_decode(
                twin, attention, media.most, both_ways=media.both_ways),
            "token_embedding": trace_embed(twin, media.most, both_ways=media.both_ways),
            **_senses(twin, delegates, media),
        }
    return lower(traced, XNNPACK.registered, delegates.payloads, delegates.store, constants,
                 progress)


def _senses(twin: Decoder, delegates: Delegates, media: Media) -> dict[str, ExportedProgram]:
    """Return the methods that encode pictures and recordings, traced."""
    traced = {}
    for method, sense in media.senses.items():
        rows = sense.config.encoder.positions
        made = delegate_sense(delegates, sense, method, rows, twin.embed_tokens)
        example, multiple = media.longest(method)
        traced[method] = trace_sense(made, example, media.mark(method), multiple)
    return traced


def attention(
    config: ModelConfig, layer: int, cache: LayerCache, start: int,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], both_ways_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend by ExecuTorch's own kernels (see `cloister.export.graph.Attention`)."""
    (q_BTHD, k_BTGD, v_BTGD), k_cache, v_cache = qkv, cache.k_cache, cache.v_cache
    torch.ops.llama.update_cache(k_BTGD, k_cache, start)
    torch.ops.llama.update_cache(v_BTGD, v_cache, start)
    window, softcap = config.window_of(layer), config.attention_softcap
    scale = config.attention_scale
    if window is None and softcap is None and both_ways_T is None:
        out: torch.Tensor = torch.ops.llama.custom_sdpa(
            q_BTHD, k_cache, v_cache, start, None, 0.0, True, scale
        )
        return out
    seen = visible(q_BTHD.shape[1], config.shape.context, start, window)
    if both_ways_T is not None:  # all new positions, past a window as well
        column = torch.arange(config.shape.context)
        seen = seen | both_ways_T[:, None] & (column >= start) & (
            column < start + q_BTHD.shape[1])
    mask = torch.where(seen, 0.0, float("-inf"))
    if softcap is None:
        # With is_causal=True beside a mask the kernel returns garbage (executorch 1.4.1).
        out = torch.ops.llama.custom_sdpa(q_BTHD, k_cache, v_cache, start, mask, 0.0, False, scale)
        return out
    # The kernel has no soft-capping: plain products, one KV head's queries at a time.
    shape = config.shape
    q = q_BTHD.transpose(1, 2).reshape(1, shape.kv_heads, -1, q_BTHD.shape[1], shape.head_size)
    k, v = (x.transpose(1, 2).unsqueeze(2) for x in (k_cache, v_cache))
    scores = softcap * torch.tanh(q @ k.transpose(3, 4) * (scale / softcap)) + mask
    out = scores.softmax(dim=-1) @ v
    return out.flatten(1, 2).transpose(1, 2)


class _Embedding(nn.Module):
    """Quantized embedding as ExecuTorch's own operator."""

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        self.bits = source.scheme.bits
        q = source.weight.q
        self.register_buffer("q", reference.pack_4bit_embedding(q) if self.bits == 4 else q)
        self.register_buffer("scale", source.weight.scale.float())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map int64[1, T] -> float32[1, T, D]."""
        ops, half = torch.ops.quantized_decomposed, 2 ** (self.bits - 1)
        lookup = ops.embedding_4bit.dtype if self.bits == 4 else ops.embedding_byte.dtype
        rows: torch.Tensor = lookup(
            self.q, self.scale, None, -half, half - 1, tokens, dtype=torch.float32
        )
        return rows


def _weight(norm: RMSNorm) -> torch.Tensor:
    return norm.weight + 1.0 if norm.offset else norm.weight


# Modules are replaced by others of the same signature, which nn.Module's typing cannot say: `Any`.
def _delegate_block(delegates: Delegates, block: Any, twin: Any, name: str) -> None:
    """Replace in `twin` what `block` computes outside attention by three delegates."""
    attn, mlp = block.attn, block.mlp
    hidden = attn.qkv.q.in_features

    def normed(g: Subgraph, x: Value, norm: str) -> Value:
        module: RMSNorm = getattr(block, norm)
        return g.norm(x, f"{name}.{norm}.weight", _weight(module), module.eps)

    def qkv(g: Subgraph, x: Value) -> list[Value]:
        x = g.rounded(normed(g, x, "attn_norm"))
        return [g.linear(x, f"{name}.attn.qkv.{part}", getattr(attn.qkv, part)) for part in "qkv"]

    def output(g: Subgraph, x: Value) -> list[Value]:
        x = g.linear(g.rounded(x), f"{name}.attn.o", attn.o)
        return [normed(g, x, "attn_post_norm") if block.post_norms else x]

    def feed_forward(g: Subgraph, x: Value) -> list[Value]:
        x = g.rounded(normed(g, x, "mlp_norm"))
        gate = g.linear(x, f"{name}.mlp.gate", mlp.gate)
        gate = g.silu(gate) if mlp.activation is Activation.SILU else g.gelu_tanh(gate)
        x = g.multiply(gate, g.linear(x, f"{name}.mlp.up", mlp.up))
        x = g.linear(g.rounded(x), f"{name}.mlp.down", mlp.down)
        return [normed(g, x, "mlp_post_norm") if block.post_norms else x]

    twin.attn.qkv = delegates(f"{name}.attn.qkv", hidden, qkv)
    twin.attn.o = delegates(f"{name}.attn.o", attn.o.in_features, output)
    twin.mlp = delegates(f"{name}.mlp", hidden, feed_forward)
    twin.attn_norm = twin.mlp_norm = nn.Identity()
    if block.post_norms:
        twin.attn_post_norm = twin.mlp_post_norm = nn.Identity()
    if block.attn.qk_norm:
        twin.attn.q_norm, twin.attn.k_norm = attn.q_norm, attn.k_norm


def _delegate(decoder: Decoder, chunk: int) -> tuple[Decoder, Delegates]:
    """Return a decoder that calls delegates where `decoder` has matrices, and the delegates."""
    delegates = Delegates(chunk)
    with torch.device("meta"):  # every parameter is replaced
        twin: Any = Decoder(decoder.config)
    for number, block in enumerate(decoder.layers):
        _delegate_block(delegates, block, twin.layers[number], f"layers.{number}")
    head: Any = decoder.head
    norm = decoder.norm

    def logits(g: Subgraph, x: Value) -> list[Value]:
        x = g.norm(x, "norm.weight", _weight(norm), norm.eps)
        return [g.linear(g.rounded(x), "head", head)]

    twin.head = delegates("head", head.in_features, logits)
    twin.norm = nn.Identity()
    embed: Any = decoder.embed
    twin.embed = _Embedding(embed)
    return twin, delegates
