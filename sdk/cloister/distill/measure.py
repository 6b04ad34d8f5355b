"""How well a decoder predicts the answers of examples that it does not learn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from cloister.distill.data import IGNORE, Packed, batch, one_pass
from cloister.distill.losses import chunk_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.distill.data import Pair
    from cloister.model.transformer import Decoder

__all__ = ["cross_entropy"]

TOKENS = 8192  # positions at a time


@torch.no_grad()
def cross_entropy(decoder: Decoder, data: Sequence[Pair]) -> float:
    """Mean cross-entropy of the answers' tokens, in nats, in float32.

    Raises:
        DataError: there are no examples.
    """
    total, count = 0.0, 0
    device = decoder.embed.weight.device
    for length, rows in one_pass(data, TOKENS, 0, decoder.config.shape.context):
        part = batch(data, length, [row for row in rows if row]).to(device)
        learnt_BT = part.labels_BT != IGNORE
        rows_ND = decoder.hidden(
            part.tokens_BT, 0, Packed(decoder.config, part.segments_BT))[learnt_BT]
        size = chunk_rows(decoder.config.shape.vocab_size)
        for some_ND, labels_N in zip(
            rows_ND.split(size), part.labels_BT[learnt_BT].split(size), strict=True
        ):
            total += float(functional.cross_entropy(
                decoder.logits(some_ND).float(), labels_N, reduction="sum"))
        count += len(rows_ND)
    return total / count
