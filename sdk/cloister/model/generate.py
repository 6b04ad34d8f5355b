"""Answers of a decoder in eager mode, many prompts at a time.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from cloister.model.cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from cloister.model.transformer import Decoder
    from cloister.tiers import Shape

__all__ = ["generate"]

BATCH = 256  # most prompts at a time
BATCH_BYTES = 512 << 20  # of their logits while they are read, and of their keys and values


@torch.no_grad()  # not inference mode, whose tensors no later training could use
def generate(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    *,
    end: Collection[int],
    limit: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The answer to each prompt, without the token of `end` that closed it.

    Greedy at temperature 0, else sampled with `generator`. An answer stops at `limit` tokens, or
    where the context is full. Prompts of one length go together, since rows are never padded; as
    many of them as BATCH_BYTES allow.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for indices in _alike(prompts, decoder.config.shape, limit):
        going = list(indices)
        cache = KVCache(decoder.config)
        room = decoder.config.shape.context - len(prompts[going[0]])
        tokens_BT = torch.tensor(
            [prompts[index] for index in going], device=decoder.cos.device)
        for _ in range(min(limit, room)):
            next_B = _pick(decoder(tokens_BT, cache)[:, -1].float(), temperature, generator)
            rows = [row for row, token in enumerate(next_B.tolist()) if token not in end]
            for row in rows:
                answers[going[row]].append(int(next_B[row]))
            if not rows:
                break
            if len(rows) < len(going):
                going = [going[row] for row in rows]
                cache.keep(rows)
            tokens_BT = next_B[rows, None]
    return answers


def _alike(prompts: Sequence[list[int]], shape: Shape, limit: int) -> Iterator[list[int]]:
    """Numbers of prompts of one length, as many as go at a time."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    for length, group in groups.items():
        positions = min(length + limit, shape.context)
        row_bytes = length * shape.vocab_size * 4 + positions * shape.kv_bytes_per_token()
        rows = max(1, min(BATCH, BATCH_BYTES // row_bytes))
        for at in range(0, len(group), rows):
            yield group[at:at + rows]


def _pick(
    logits_BV: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """int64[B]."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    chances = (logits_BV / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]
