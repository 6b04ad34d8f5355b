"""The KV cache of a decoder in eager mode, and its attention.

Shapes: B batch, T new positions, S positions seen, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from cloister.model.config import ModelConfig

__all__ = ["Attend", "KVCache", "attend", "visible"]


class Attend(Protocol):
    """The attention of a layer: takes its new keys and values, and attends to all seen so far."""

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        """Return the attention output, [B, T, H, D]."""


def visible(
    rows: int, columns: int, start: int, window: int | None,
    blocks_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Return which keys each query sees, bool[rows, columns]; queries begin at `start`.

    Those of the same block, if not -1, see one another in both directions.
    """
    query = torch.arange(start, start + rows)[:, None]
    key = torch.arange(columns)[None, :]
    seen = key <= query
    if blocks_T is not None:
        seen[:, start:] |= (blocks_T[:, None] == blocks_T) & (blocks_T >= 0)
    return seen if window is None else seen & (key > query - window)


def attend(
    q_BTHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, mask_TS: torch.Tensor,
    *, scale: float, softcap: float | None
) -> torch.Tensor:
    """Return grouped-query attention, [B, T, H, D]; `mask_TS` is True where a key is seen."""
    if q_BTHD.shape[1] == 1 and softcap is None:
        return _attend_one(q_BTHD, k_BSGD, v_BSGD, mask_TS, scale=scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    if softcap is None:
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_TS, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
        out = scores.masked_fill(~mask_TS, float("-inf")).softmax(dim=-1) @ v
    return out.transpose(1, 2)


def _attend_one(
    q_B1HD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, mask_1S: torch.Tensor,
    *, scale: float
) -> torch.Tensor:
    """Attend with one query a head: those that share keys are rows of one product.

    In float32: a product of bfloat16 with one vector takes a processor ten times as long.
    """
    with torch.autocast(q_B1HD.device.type, enabled=False):
        k, v = (x.float().transpose(1, 2) for x in (k_BSGD, v_BSGD))
        q_BGRD = q_B1HD.float().squeeze(1).unflatten(1, (k.shape[1], -1))
        out_BGRD = functional.scaled_dot_product_attention(
            q_BGRD, k, v, attn_mask=mask_1S, scale=scale)
    return out_BGRD.flatten(1, 2).unsqueeze(1).to(q_B1HD.dtype)


@dataclass
class KVCache:
    """Keys and values of one sequence batch, in room that grows: [B, S or more, G, D] a layer.

    A plain dense cache for eager use; the exported program has its own (export/graph.py).
    """

    config: ModelConfig
    start: int = 0  # positions already cached
    blocks_T: torch.Tensor | None = None  # of the new positions (see `visible`)

    def __post_init__(self) -> None:
        self._layers: dict[int, tuple[torch.Tensor, ...]] = {}

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        """Append keys and values, then attend, [B, T, H, D]."""
        k_BSGD, v_BSGD = self._appended(layer, k_BTGD, v_BTGD)
        mask = visible(
            q_BTHD.shape[1], k_BSGD.shape[1], self.start, self.config.window_of(layer),
            self.blocks_T,
        ).to(q_BTHD.device)
        return attend(
            q_BTHD, k_BSGD, v_BSGD, mask,
            scale=self.config.attention_scale, softcap=self.config.attention_softcap,
        )

    def _appended(self, layer: int, *new: torch.Tensor) -> list[torch.Tensor]:
        """Write new keys and values behind those seen, in twice the room where it is too little."""
        kept, end = self._layers.get(layer, new), self.start + new[0].shape[1]
        if kept is not new:
            kept = tuple(
                x if x.shape[1] >= end else functional.pad(x, (0, 0, 0, 0, 0, 2 * end - x.shape[1]))
                for x in kept)
            for x, new_BTGD in zip(kept, new, strict=True):
                x[:, self.start:end] = new_BTGD
        self._layers[layer] = kept
        return [x[:, :end] for x in kept]

    def advance(self, positions: int) -> None:
        """Count `positions` as cached, once every layer has appended them."""
        self.start += positions

    def keep(self, rows: list[int]) -> None:
        """Drop every sequence of the batch but `rows`."""
        self._layers = {
            layer: tuple(x[rows] for x in kept) for layer, kept in self._layers.items()
        }
