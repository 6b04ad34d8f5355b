"""The cross-entropy of a decoder on examples that it does not learn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from cloister.distill.data import IGNORE, Packed, batch, one_pass
from cloister.distill.losses import chunk_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.distill.data import Batch
    from cloister.distill.parallel import Sharded
    from cloister.model.transformer import Decoder
    from cloister.pairs import Pair

__all__ = ["TOKENS", "cross_entropy"]

TOKENS = 8192  # positions at a time


@torch.no_grad()
def cross_entropy(model: Sharded, data: Sequence[Pair]) -> float:
    """Return the mean cross-entropy of the answers' tokens, in nats, in float32.

    Raises:
        DataError: there are no examples.
    """
    decoder, parallel = model.decoder, model.parallel
    sums = torch.zeros(2, dtype=torch.float64)
    for length, rows in one_pass(data, TOKENS, 0, decoder.config.shape.context):
        whole = batch(data, length, [row for row in rows if row])
        part = whole.part(parallel.rank, parallel.world).to(parallel.device)
        sums += torch.tensor(model(lambda part=part: _sums(decoder, part)), dtype=torch.float64)
    model.release()
    total, count = parallel.sum(sums.to(parallel.device))
    return total / count


def _sums(decoder: Decoder, part: Batch) -> tuple[float, int]:
    """Return the summed cross-entropy of the answers' tokens, and their number."""
    learnt_BT = part.labels_BT != IGNORE
    rows_ND = decoder.hidden(part.tokens_BT, 0, Packed(decoder.config, part.segments_BT))[learnt_BT]
    size, total = chunk_rows(decoder.config.shape.vocab_size), 0.0
    for some_ND, labels_N in zip(
        rows_ND.split(size), part.labels_BT[learnt_BT].split(size), strict=True
    ):
        total += float(functional.cross_entropy(
            decoder.logits(some_ND).float(), labels_N, reduction="sum"))
    return total, len(rows_ND)
