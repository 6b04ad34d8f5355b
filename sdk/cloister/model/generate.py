"""Generation in eager mode, many prompts at a time.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloister.model.cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from cloister.model.transformer import Decoder

__all__ = ["generate", "width"]

BATCH = 256  # most prompts at a time on a processor
SPREAD = 64  # most tokens by which they differ in length
BATCH_BYTES = 1 << 30  # of their logits, and of their keys and values


def width(device: torch.device) -> int:
    """Return how many times as many sequences as on a processor go together on `device`."""
    return 16 if device.type == "cuda" else 1


@torch.no_grad()  # not inference mode, whose tensors no later training could use
def generate(
    decoder: Decoder, prompts: Sequence[list[int]], *, end: Collection[int], limit: int,
    temperature: float = 0.0, rng: torch.Generator | None = None
) -> list[list[int]]:
    """Return the answer to each prompt, without the token of `end` that closed it.

    Greedy at temperature 0, else sampled with `rng`. An answer stops at `limit` tokens, or
    where the context is full. Prompts of about one length go together, as many as BATCH_BYTES
    allow: what they all have is read at once, the rest of the longer ones token by token beside
    the answers of the shorter ones. So rows are never padded.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    context, device = decoder.config.shape.context, decoder.cos.device
    for group in _alike(prompts, decoder, limit):
        going, cache = list(group), KVCache(decoder.config)
        at = len(prompts[going[0]])  # positions that are read
        tokens_BT = torch.tensor([prompts[index][:at] for index in going], device=device)
        while going:
            last_B1D = decoder.hidden(tokens_BT, cache.start, cache)[:, -1:]
            cache.advance(tokens_BT.shape[1])
            next_B = _pick(decoder.logits(last_B1D)[:, 0].float(), temperature, rng)
            rows, next_tokens = [], []
            for row, (index, token) in enumerate(zip(going, next_B.tolist(), strict=True)):
                prompt, answer = prompts[index], answers[index]
                if at < len(prompt):
                    token = prompt[at]
                elif token in end:
                    continue
                else:
                    answer.append(token)
                    if len(answer) == min(limit, context - len(prompt)):
                        continue
                rows.append(row)
                next_tokens.append(token)
            if rows and len(rows) < len(going):
                cache.keep(rows)
            going = [going[row] for row in rows]
            tokens_BT = torch.tensor(next_tokens, dtype=torch.int64, device=device)[:, None]
            at += 1
    return answers


def _alike(
    prompts: Sequence[list[int]], decoder: Decoder, limit: int
) -> Iterator[list[int]]:
    """Yield numbers of prompts that go together, shortest first, but none that fill the context."""
    group: list[int] = []
    shape, device = decoder.config.shape, decoder.cos.device
    kv_bytes = shape.kv_bytes_per_token() * decoder.cos.element_size() // 4
    most, room = BATCH * width(device), BATCH_BYTES
    if device.type == "cuda":  # the cache doubles, and is copied meanwhile
        room = torch.cuda.mem_get_info(device)[0] // 4
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        length = len(prompts[index])
        if length >= shape.context or limit < 1:
            continue
        positions = min(length + limit, shape.context)
        row_bytes = shape.vocab_size * 4 + positions * kv_bytes
        if group and (
            len(group) == most or (len(group) + 1) * row_bytes > room
            or length - len(prompts[group[0]]) > SPREAD
        ):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _pick(logits_BV: torch.Tensor, temperature: float, rng: torch.Generator | None) -> torch.Tensor:
    """Return the next token of each row, [B, V] -> int64[B]."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # The first entry at which the sum passes a random number: multinomial draws one an entry.
    sums_BV = (logits_BV / temperature).softmax(-1).cumsum(-1)
    sought_B1 = torch.rand(len(sums_BV), 1, generator=rng, device=sums_BV.device) * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, sought_B1, right=True).clamp(max=sums_BV.shape[1] - 1)[:, 0]
