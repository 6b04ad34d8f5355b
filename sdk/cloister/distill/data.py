"""Examples as token ids, packed into rows of a few fixed lengths.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import random
import zlib
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cloister.errors import DataError
from cloister.model.cache import attend

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.model.config import ModelConfig
    from cloister.pairs import Pair

__all__ = ["IGNORE", "Batch", "Packed", "batch", "fingerprint", "one_pass", "schedule_rows"]

IGNORE = -100  # label of a token that is not to be learnt
ROWS = (128, 256, 512, 1024)  # tokens; longer examples get rows of twice the last, and so on

Row = list[int]
"""Numbers of the examples that share a row."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed examples."""

    tokens_BT: torch.Tensor = field(repr=False)  # int64; 0 where a row is not full
    # int64, the token that follows; IGNORE where nothing is to be learnt
    labels_BT: torch.Tensor = field(repr=False)
    segments_BT: torch.Tensor  # int64, number of the example in its row; -1 where there is none
    keys: tuple[int, ...]  # numbers of the examples, row by row

    def part(self, rank: int, world: int) -> Batch:
        """Return the rows of process `rank` of `world`, or a row of padding."""
        rows = range(rank, len(self.tokens_BT), world)
        if not rows:
            empty = torch.zeros_like(self.tokens_BT[:1])
            return Batch(tokens_BT=empty, labels_BT=empty + IGNORE, segments_BT=empty - 1, keys=())
        counts = (self.segments_BT.amax(1) + 1).tolist()
        starts = [sum(counts[:row]) for row in range(len(counts))]
        return Batch(
            tokens_BT=self.tokens_BT[rank::world], labels_BT=self.labels_BT[rank::world],
            segments_BT=self.segments_BT[rank::world],
            keys=tuple(
                key for row in rows for key in self.keys[starts[row]:starts[row] + counts[row]]
            ),
        )

    def to(self, device: torch.device) -> Batch:
        """Return the same on `device`."""
        return Batch(
            tokens_BT=self.tokens_BT.to(device), labels_BT=self.labels_BT.to(device),
            segments_BT=self.segments_BT.to(device), keys=self.keys,
        )


class Packed:
    """Attention among the tokens of one example only, causal, for a decoder without a cache.

    Rotary positions go on through a row: only their differences count.
    """

    def __init__(self, config: ModelConfig, segments_BT: torch.Tensor) -> None:
        self.config = config
        self.segments_BT = segments_BT
        self._masks: dict[int | None, torch.Tensor] = {}

    def _mask(self, window: int | None) -> torch.Tensor:
        """Return which keys each query sees, bool[B, 1, T, T]."""
        if window not in self._masks:
            place = torch.arange(self.segments_BT.shape[1], device=self.segments_BT.device)
            seen = place[:, None] >= place
            if window is not None:
                seen = seen & (place > place[:, None] - window)
            same = self.segments_BT[:, :, None] == self.segments_BT[:, None, :]
            self._masks[window] = (same & seen)[:, None]
        return self._masks[window]

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        """Return the attention output, [B, T, H, D]."""
        mask, scale = self._mask(self.config.window_of(layer)), self.config.attention_scale
        softcap = self.config.attention_softcap
        if q_BTHD.device.type != "cpu":
            return attend(q_BTHD, k_BTGD, v_BTGD, mask, scale=scale, softcap=softcap)
        # Rows are short: whole matrices of scores, a third of the time of the fused kernel's
        # backward pass. Query heads of a group stand below each other, so that keys are not copied.
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
        groups, length = k.shape[1], k.shape[2]
        scores = (q * scale).unflatten(1, (groups, -1)).flatten(2, 3) @ k.transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.unflatten(2, (-1, length)).masked_fill(~mask[:, :, None], float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out: torch.Tensor = (weights.flatten(2, 3) @ v).unflatten(2, (-1, length))
        return out.flatten(1, 2).transpose(1, 2)


def fingerprint(data: Sequence[Pair]) -> str:
    """Return the length of a data set and a checksum of every id."""
    crc = 0
    for prompt, answer in data:
        crc = zlib.crc32(array("q", [len(prompt), *prompt, *answer]).tobytes(), crc)
    return f"{len(data)} {crc:08x}"


def schedule_rows(
    data: Sequence[Pair], tokens: int, seed: int, context: int
) -> Iterator[tuple[int, list[Row]]]:
    """Yield pass after pass of `one_pass`, without end, each shuffled anew."""
    passes = 0
    while True:
        yield from one_pass(data, tokens, f"{seed} {passes}", context)
        passes += 1


def one_pass(
    data: Sequence[Pair], tokens: int, seed: str | int, context: int
) -> list[tuple[int, list[Row]]]:
    """Return the row length of each batch, and its rows of example numbers.

    Every example comes once, in a row that holds it whole. A batch has rows of one length,
    `tokens` positions in all (one row at least); the last ones may be empty.

    Raises:
        DataError: there are no examples.
    """
    if not data:
        raise DataError("There are no examples to train on; name other data.")
    lengths = [length for length in ROWS if length < context]
    longer = 2 * ROWS[-1]
    while longer < context:
        lengths.append(longer)
        longer *= 2
    lengths.append(context)
    sizes = [len(prompt) + len(answer) for prompt, answer in data]
    rng = random.Random(f"rows {seed}")  # not for secrets
    order = list(range(len(data)))
    rng.shuffle(order)
    batches: list[tuple[int, list[Row]]] = []
    for length, rows in _packed(order, sizes, lengths).items():
        width = max(1, tokens // length)
        rows += [[]] * (-len(rows) % width)  # batches of few shapes: compiled code is reused
        batches += [(length, rows[at:at + width]) for at in range(0, len(rows), width)]
    rng.shuffle(batches)
    return batches


def _packed(order: list[int], sizes: list[int], lengths: list[int]) -> dict[int, list[Row]]:
    """Return rows by length, packed long examples first, each where it leaves the least room."""
    least = min(sizes)
    rows: dict[int, list[Row]] = {length: [] for length in lengths}
    free: list[tuple[int, int, Row]] = []  # room, number of the row, the row; by room
    opened = 0
    fitting = [lengths[bisect_left(lengths, size)] for size in sizes]
    for number in sorted(order, key=lambda number: -fitting[number]):
        size = sizes[number]
        at = bisect_left(free, (size,))
        if at < len(free):
            room, place, row = free.pop(at)
        else:
            room, place, row = fitting[number], opened, []
            rows[room].append(row)
            opened += 1
        row.append(number)
        if room - size >= least:
            insort(free, (room - size, place, row))
    return rows


def batch(data: Sequence[Pair], length: int, rows: Sequence[Row]) -> Batch:
    """Return rows of `length` positions with the examples whose numbers `rows` lists."""
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels, segments = torch.full_like(tokens, IGNORE), torch.full_like(tokens, -1)
    for at, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row):
            prompt, answer = data[number]
            end = start + len(prompt) + len(answer)
            tokens[at, start:end] = torch.tensor(prompt + answer)
            labels[at, start + len(prompt) - 1:end - 1] = torch.tensor(answer)
            segments[at, start:end] = segment
            start = end
    return Batch(
        tokens_BT=tokens, labels_BT=labels, segments_BT=segments,
        keys=tuple(number for row in rows for number in row),
    )
