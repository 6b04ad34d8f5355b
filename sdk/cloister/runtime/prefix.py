"""Keys and values of text that was read before, sealed, so that it is not read again.

Shapes: T positions, G KV heads, D head size.

Blocks of BLOCK positions are shared by all sessions of a namespace. A block's name chains over the
ids of all text up to its end, under the namespace's key: equal beginnings find equal blocks, and
nobody else can tell what they are of. A conversation also keeps its state, the ids and what is
behind their last whole block, so that it goes on where it stopped, to the bit.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch

from cloister.errors import NotEnoughDisk, VaultDamaged
from cloister.vault.namespace import Kind
from cloister.vault.seal import context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.runtime.engine import Engine
    from cloister.vault.namespace import Namespace
    from cloister.vault.retention import Retention

__all__ = ["BLOCK", "Precision", "PrefixCache"]

BLOCK = 64  # positions
_ID_BYTES = 4


class Precision(StrEnum):
    """How keys and values are kept."""

    EXACT = "float32"  # the next logits are those that would have come, to the bit
    EIGHT_BITS = "int8"  # a quarter of the size, and not the same logits


class PrefixCache:
    """What an engine has read, kept in a namespace, and put back."""

    def __init__(
        self, engine: Engine, space: Namespace, *, precision: Precision = Precision.EXACT,
        retention: Retention | None = None,
    ) -> None:
        self.engine, self.space, self.precision = engine, space, precision
        self.retention = retention  # of all blocks and states
        self._bound = bytes.fromhex(engine.model_id)

    def fetch(self, ids: Sequence[int]) -> int:
        """Put back the longest beginning of `ids` that is kept, if the engine holds less of it.

        How many positions it holds more. A block that is damaged ends it.
        """
        held, known = self.engine.held, 0
        while known < min(len(held), len(ids)) and held[known] == ids[known]:
            known += 1
        names = list(self._names(ids[:-1]))  # the last one is read for its logits
        found = 0
        while found < len(names) and self.space.has(Kind.PREFIX, names[found]):
            found += 1
        if found * BLOCK <= known:
            return 0
        return max(0, self._put_back(ids, names[:found], known // BLOCK) - known)

    def names(self, conversation: bytes) -> list[bytes]:
        """Of all that `keep` would keep."""
        return [*self._names(self.engine.held), self._state(conversation)]

    def keep(self, conversation: bytes | None = None) -> None:
        """Keep what the engine holds: its whole blocks, and for a conversation all of it.

        On a full disk, less of it: it is a cache, and what is not there is read again.

        Raises:
            VaultError: see `Namespace.put_large`.
        """
        with suppress(NotEnoughDisk):
            self._keep(conversation)

    def _keep(self, conversation: bytes | None) -> None:
        ids, engine, space = self.engine.held, self.engine, self.space
        names = list(self._names(ids))
        for number, name in enumerate(names):
            if not space.has(Kind.PREFIX, name):
                rows = engine.rows(number * BLOCK, (number + 1) * BLOCK)
                space.put_large(Kind.PREFIX, name, self._packed(rows), bound=self._bound)
        if conversation is not None:
            rest = engine.rows(len(names) * BLOCK, len(ids))
            head = b"".join(id_.to_bytes(_ID_BYTES, "big") for id_ in (len(ids), *ids))
            space.put_large(
                Kind.PREFIX, self._state(conversation), [head, *self._packed(rest)],
                bound=self._bound)
        if self.retention is not None:
            space.trim(Kind.PREFIX, self.retention)

    def resume(self, conversation: bytes) -> int:
        """Put back what a conversation's engine held; how many positions."""
        try:
            data = self.space.get_large(
                Kind.PREFIX, self._state(conversation), bound=self._bound)
        except VaultDamaged:  # a cache: what is lost is read again
            return 0
        if data is None:
            return 0
        words = [
            int.from_bytes(data[at:at + _ID_BYTES], "big")
            for at in range(0, _ID_BYTES * (1 + int.from_bytes(data[:_ID_BYTES], "big")), _ID_BYTES)
        ]
        ids, rest = words[1:], memoryview(data)[_ID_BYTES * len(words):]
        names = list(self._names(ids))
        whole = self._put_back(ids, names, 0)
        if whole < len(names) * BLOCK:
            return whole
        self._unpack(rest, self.engine.rows(whole, len(ids)))
        self.engine.hold(ids)
        return len(ids)

    def _put_back(self, ids: Sequence[int], names: Sequence[bytes], first: int) -> int:
        """Write the blocks from number `first` on; how many positions the engine holds then."""
        done = first
        held = self.engine.held[:first * BLOCK]
        self.engine.hold(held)  # so that a failure in between leaves nothing half-written in use
        for number in range(first, len(names)):
            try:
                data = self.space.get_large(Kind.PREFIX, names[number], bound=self._bound)
            except VaultDamaged:
                self.space.forget(Kind.PREFIX, names[number])  # it is made again
                break
            if data is None:
                break
            self._unpack(
                memoryview(data), self.engine.rows(number * BLOCK, (number + 1) * BLOCK))
            done = number + 1
        self.engine.hold(ids[:done * BLOCK])
        return done * BLOCK

    def _names(self, ids: Sequence[int]) -> Iterator[bytes]:
        """Of each whole block of `ids`, its name."""
        keys, name = self.space.vault.keys, context("prefix", self._bound, self.precision)
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            text = b"".join(
                id_.to_bytes(_ID_BYTES, "big") for id_ in ids[start:start + BLOCK])
            name = keys.tag("block", self.space.tag, name, text)
            yield name

    def _state(self, conversation: bytes) -> bytes:
        return context("state", self._bound, self.precision, conversation)

    def _packed(self, rows: Sequence[torch.Tensor]) -> Iterator[memoryview]:
        rows = [row_TGD for row_TGD in rows if row_TGD.numel()]
        if self.precision is Precision.EXACT:
            yield from map(_bytes, rows)
            return
        scales = [row_TGD.abs().amax(-1, keepdim=True) / 127 for row_TGD in rows]
        yield from map(_bytes, scales)
        for row_TGD, scale_TG1 in zip(rows, scales, strict=True):
            steps_TGD = row_TGD / scale_TG1.clamp(min=torch.finfo(torch.float32).tiny)
            yield _bytes(steps_TGD.round().to(torch.int8))

    def _unpack(self, data: memoryview, rows: Sequence[torch.Tensor]) -> None:
        """Write into `rows` what `_packed` gave for them: nothing in it tells shapes or types."""
        rows = [row_TGD for row_TGD in rows if row_TGD.numel()]
        at = 0

        def take(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            nonlocal at
            start, at = at, at + shape.numel() * dtype.itemsize
            return torch.frombuffer(
                data, dtype=dtype, count=shape.numel(), offset=start).view(shape)

        if self.precision is Precision.EXACT:
            for row_TGD in rows:
                row_TGD.copy_(take(row_TGD.shape, row_TGD.dtype))
        else:
            scales = [take(row_TGD[..., :1].shape, torch.float32) for row_TGD in rows]
            for row_TGD, scale_TG1 in zip(rows, scales, strict=True):
                row_TGD.copy_(take(row_TGD.shape, torch.int8) * scale_TG1)
        assert at == len(data), "sealed for this model, so of its size"


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.contiguous().numpy()  # whose buffer numpy's types do not tell of
    return memoryview(array).cast("B")
