"""The decoder: one architecture, every layout by configuration.

Shapes: B batch, T positions, D hidden size, H query heads, G KV heads, K head size, F feed-forward
size, V vocabulary.

Covers the Llama 2 and 3, Qwen 2.5 and 3, Gemma 2 and 3 (text), SmolLM 2 and 3 and Mistral layouts;
`checkpoint.py` maps their configurations and tensor names onto this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.model import rope
from cloister.model.cache import Attend, KVCache
from cloister.model.config import Activation, ModelConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Attention", "Block", "Decoder", "FeedForward", "Projection", "RMSNorm",
           "initial_weights"]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, *, eps: float, offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] -> [..., D]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:  # Gemma multiplies before it rounds to the input's type
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class Projection(nn.Module):
    """Queries, keys and values of one input, as three linear layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.shape
        q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.q = nn.Linear(shape.hidden_size, q, bias=config.qkv_bias)
        self.k = nn.Linear(shape.hidden_size, kv, bias=config.qkv_bias)
        self.v = nn.Linear(shape.hidden_size, kv, bias=config.qkv_bias)

    def forward(self, x_BTD: torch.Tensor) -> Sequence[torch.Tensor]:
        """Map [B, T, D] -> [B, T, H*K], [B, T, G*K], [B, T, G*K]."""
        return self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        shape = config.shape
        self.layer = layer
        self.rotary = layer not in config.no_rope_layers
        self.head_size = shape.head_size
        self.qkv = Projection(config)
        self.o = nn.Linear(
            shape.heads * shape.head_size, shape.hidden_size, bias=config.output_bias
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(shape.head_size, eps=config.norm_eps, offset=config.norm_offset)
            self.k_norm = RMSNorm(shape.head_size, eps=config.norm_eps, offset=config.norm_offset)
        self.qk_norm = config.qk_norm

    def forward(
        self, x_BTD: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """Map [B, T, D] -> [B, T, D]; `cos_sin` are [T, 1, K] each."""
        q, k, v = (x.unflatten(-1, (-1, self.head_size)) for x in self.qkv(x_BTD))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:  # in one go: half the operators in an exported program
            heads = (q.shape[2], k.shape[2])
            q, k = rope.rotate(torch.cat((q, k), dim=2), *cos_sin).split(heads, dim=2)
        out: torch.Tensor = self.o(attend(self.layer, q, k, v).flatten(2))
        return out


class FeedForward(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.shape
        self.activation = config.activation
        self.gate = nn.Linear(shape.hidden_size, shape.feed_forward, bias=config.mlp_bias)
        self.up = nn.Linear(shape.hidden_size, shape.feed_forward, bias=config.mlp_bias)
        self.down = nn.Linear(shape.feed_forward, shape.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Map [B, T, D] -> [B, T, D]."""
        gate = self.gate(x_BTD)
        if self.activation is Activation.SILU:
            gate = functional.silu(gate)
        else:
            gate = functional.gelu(gate, approximate="tanh")
        out: torch.Tensor = self.down(gate * self.up(x_BTD))
        return out


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.shape.hidden_size, eps=config.norm_eps, offset=config.norm_offset)

        self.attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.post_norms = config.post_norms
        if config.post_norms:
            self.attn_post_norm, self.mlp_post_norm = norm(), norm()

    def forward(
        self, x_BTD: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        """Map [B, T, D] -> [B, T, D]."""
        out = self.attn(self.attn_norm(x_BTD), cos_sin, attend)
        x_BTD = x_BTD + (self.attn_post_norm(out) if self.post_norms else out)
        out = self.mlp(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + (self.mlp_post_norm(out) if self.post_norms else out)
        return x_BTD


class Decoder(nn.Module):
    """A decoder-only language model.

    `embed`, every linear layer and `head` may be replaced by modules of the same signature
    (quantized, or calls into an exported program) without touching this class.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    local_cos: torch.Tensor
    local_sin: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.shape
        self.config = config
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, eps=config.norm_eps, offset=config.norm_offset)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight
        # Computed on the processor even under torch.device("meta"): they are no weights.
        with torch.device("cpu"):
            cos, sin = rope.table(
                shape.head_size, shape.context, config.rope_theta, config.rope_scaling
            )
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
            if config.local_rope_theta is not None:
                cos, sin = rope.table(shape.head_size, shape.context, config.local_rope_theta, None)
                self.register_buffer("local_cos", cos, persistent=False)
                self.register_buffer("local_sin", sin, persistent=False)

    def initialize(self, seed: int) -> None:
        """Set weights to train from, see `initial_weights`."""
        with torch.no_grad():
            for parameter, (_, value) in zip(
                self.parameters(), initial_weights(self.config, seed), strict=True
            ):
                parameter.copy_(value)

    def forward(self, tokens_BT: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Return logits after each token, int64[B, T] -> [B, T, V].

        With `cache` the tokens follow the cached ones, and are added to them.
        """
        cache = KVCache(self.config) if cache is None else cache
        x_BTD = self.hidden(tokens_BT, cache.start, cache)
        cache.advance(tokens_BT.shape[1])
        return self.logits(x_BTD)

    def hidden(self, tokens_BT: torch.Tensor, start: int, attend: Attend) -> torch.Tensor:
        """Return normed last hidden states, int64[B, T] -> [B, T, D]; tokens begin at `start`."""
        return self.hidden_from(self.embed_tokens(tokens_BT), start, attend)

    def embed_tokens(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return what the first layer reads of tokens, int64[B, T] -> [B, T, D]."""
        x_BTD: torch.Tensor = self.embed(tokens_BT)
        if self.config.embedding_scale != 1.0:
            # Rounded to the weights' type, as the checkpoints that need it were trained.
            x_BTD = x_BTD * torch.tensor(self.config.embedding_scale, dtype=x_BTD.dtype)
        return x_BTD

    def hidden_from(self, x_BTD: torch.Tensor, start: int, attend: Attend) -> torch.Tensor:
        """Return normed last hidden states of `embed_tokens`' or an encoder's, [B, T, D]."""
        length = x_BTD.shape[1]
        for layer, block in enumerate(self.layers):
            x_BTD = block(x_BTD, self.cos_sin(layer, start, length), attend)
        out: torch.Tensor = self.norm(x_BTD)
        return out

    def cos_sin(self, layer: int, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotary tables of a layer for `length` positions, [T, 1, K] each."""
        cos, sin = self.cos, self.sin
        if self.config.local_rope_theta is not None and layer in self.config.windowed_layers:
            cos, sin = self.local_cos, self.local_sin
        return cos.narrow(0, start, length), sin.narrow(0, start, length)

    def logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return scores of every next token, [B, T, D] -> [B, T, V]."""
        logits: torch.Tensor = self.head(x_BTD)
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def initial_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights to train from, one by one, a tied matrix once.

    Normal, std 0.02, residual outputs scaled by depth; norms of one, no biases.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        value = torch.zeros(parameter.shape)
        if name.endswith(("attn.o.weight", "mlp.down.weight")):
            value.normal_(std=0.02 / (2 * config.shape.layers) ** 0.5, generator=rng)
        elif parameter.dim() == 2:
            value.normal_(std=0.02, generator=rng)
        elif not name.endswith("bias") and not config.norm_offset:
            value += 1
        yield name, value
