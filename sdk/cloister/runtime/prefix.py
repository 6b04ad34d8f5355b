"""Keys and values of text that was read before, sealed, so that it is not read again.

Shapes: T positions, G KV heads, D head size.

Blocks of BLOCK positions are shared by all sessions of a namespace. A block's name chains over the
ids of all text up to its end, under the namespace's key: equal beginnings find equal blocks, and
nobody else can tell what they are of. A conversation also keeps its state, the ids and what is
behind their last whole block, so that it goes on where it stopped, to the bit.

Vectors of pictures and recordings are kept beside them, by their keyed digests.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch

from cloister.errors import EngineBusy, NotEnoughDisk, VaultDamaged
from cloister.pieces import MEDIA
from cloister.runtime.core import DIGEST_BYTES, MediaPosition, encoded
from cloister.runtime.encoded import Encoded
from cloister.vault.namespace import Kind
from cloister.vault.retention import Retention
from cloister.vault.seal import context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.runtime.core import Position
    from cloister.runtime.engine import Engine
    from cloister.vault.namespace import Identity, Namespace

__all__ = ["BLOCK", "PREFIXES", "Precision", "PrefixCache"]

BLOCK = 64  # positions
PREFIXES = Retention(most_bytes=4 << 30, hours=30 * 24)


class Precision(StrEnum):
    """How keys and values are kept."""

    EXACT = "float32"  # as the program holds them; the next logits are the same, to the bit
    EIGHT_BITS = "int8"  # a quarter of the size, and not the same logits, unless they are such


class PrefixCache:
    """What an engine has read, kept in a namespace, and put back."""

    def __init__(
        self, engine: Engine, space: Namespace, *, precision: Precision = Precision.EXACT,
        retention: Retention | None = None,
    ) -> None:
        self.engine, self.space, self.precision = engine, space, precision
        self.retention = retention  # of all blocks and states
        self._bound = bytes.fromhex(engine.model_id)

    def fetch(self, positions: Sequence[Position]) -> int:
        """Put back the longest beginning of `positions` that is kept, if the engine has less of it.

        Return the number of restored positions. A block that is damaged ends it.
        """
        cached = self.engine.common(positions)
        names = list(self._names(positions[:-1]))  # the last one is read for its logits
        found = 0
        while found < len(names) and self.space.has(Kind.PREFIX, names[found]):
            found += 1
        if found * BLOCK <= cached:
            return 0
        with self.engine.exclusive():
            return max(0, self._put_back(positions, names[:found], cached // BLOCK) - cached)

    @property
    def media_key(self) -> bytes:
        """The key of the digests of the namespace's pictures and recordings."""
        return self.space.vault.keys.tag("media", self.space.tag)

    def fetch_media(self, digest: bytes) -> torch.Tensor | None:
        """Return the vectors of a picture or recording, float32[N, E], if they are kept."""
        name = self._media(digest)
        try:
            data = self.space.get_large(Kind.PREFIX, name, bound=self._bound)
        except VaultDamaged:
            self.space.forget(Kind.PREFIX, name)  # it is made again
            return None
        if data is None:
            return None
        count = int.from_bytes(data[:4], "big")
        return torch.frombuffer(data, dtype=torch.float32, offset=4).view(count, -1)

    def names(self, positions: Sequence[Position], conversation: bytes) -> list[bytes]:
        """Names that `keep` would write, the conversation's own last."""
        read = positions[:self.engine.common(positions)]
        media = {each.digest: None for each in read if isinstance(each, MediaPosition)}
        return [*self._names(read), *map(self._media, media), self._state(conversation)]

    def keep(
        self, positions: Sequence[Position], conversation: bytes | None = None,
        owner: Identity | None = None,
    ) -> None:
        """Keep what the engine has cached of `positions`: whole blocks, for a conversation all.

        Of pictures and recordings also the vectors, where they were made to be read.

        With an `owner`, only until that is forgotten (see `Namespace.put_large`).

        On a full disk, or while another thread uses the engine, less of it: it is a cache, and what
        is not there is read again.

        Raises:
            VaultError: see `Namespace.put_large`.
        """
        with suppress(NotEnoughDisk, EngineBusy), self.engine.exclusive():
            self._keep(list(positions[:self.engine.common(positions)]), conversation, owner)

    def _keep(
        self, positions: list[Position], conversation: bytes | None, owner: Identity | None
    ) -> None:
        engine, space = self.engine, self.space
        names = list(self._names(positions))
        for number, name in enumerate(names):
            if not space.has(Kind.PREFIX, name):
                rows = engine.buffers(number * BLOCK, (number + 1) * BLOCK)
                space.put_large(
                    Kind.PREFIX, name, self._packed(rows), bound=self._bound, owner=owner)
        for digest, vectors_NE in _made(positions).items():
            if not space.has(Kind.PREFIX, name := self._media(digest)):
                space.put_large(
                    Kind.PREFIX, name, [len(vectors_NE).to_bytes(4, "big"), _bytes(vectors_NE)],
                    bound=self._bound, owner=owner)
        if conversation is not None:
            rest = engine.buffers(len(names) * BLOCK, len(positions))
            space.put_large(
                Kind.PREFIX, self._state(conversation),
                [_encode(positions), *self._packed(rest)], bound=self._bound, owner=owner)
        if self.retention is not None:
            space.trim(Kind.PREFIX, self.retention)

    def resume(self, conversation: bytes) -> int:
        """Put back what a conversation's engine had cached; return how many positions."""
        try:
            data = self.space.get_large(
                Kind.PREFIX, self._state(conversation), bound=self._bound)
        except VaultDamaged:  # a cache: what is lost is read again
            return 0
        if data is None:
            return 0
        positions, rest = _decode(data)
        names = list(self._names(positions))
        with self.engine.exclusive():
            whole = self._put_back(positions, names, 0)
            if whole < len(names) * BLOCK:
                return whole
            self._unpack(rest, self.engine.buffers(whole, len(positions)))
            self.engine.mark_cached(positions)
        return len(positions)

    def _put_back(
        self, positions: Sequence[Position], names: Sequence[bytes], first: int
    ) -> int:
        """Write the blocks from number `first` on; return how many positions are cached then."""
        done = first
        self.engine.truncate(first * BLOCK)  # a failure in between leaves no half block in use
        for number in range(first, len(names)):
            try:
                data = self.space.get_large(Kind.PREFIX, names[number], bound=self._bound)
            except VaultDamaged:
                self.space.forget(Kind.PREFIX, names[number])  # it is made again
                break
            if data is None:
                break
            self._unpack(
                memoryview(data), self.engine.buffers(number * BLOCK, (number + 1) * BLOCK))
            done = number + 1
        self.engine.mark_cached(positions[:done * BLOCK])
        return done * BLOCK

    def _names(self, positions: Sequence[Position]) -> Iterator[bytes]:
        """Name each whole block of `positions`."""
        keys, name = self.space.vault.keys, context("prefix", self._bound, self.precision)
        for start in range(0, len(positions) - BLOCK + 1, BLOCK):
            text = b"".join(map(encoded, positions[start:start + BLOCK]))
            name = keys.tag("block", self.space.tag, name, text)
            yield name

    def _state(self, conversation: bytes) -> bytes:
        return context("state", self._bound, self.precision, conversation)

    def _media(self, digest: bytes) -> bytes:
        return context("encoded", self._bound, digest)

    def _packed(self, rows: Sequence[torch.Tensor]) -> Iterator[memoryview]:
        rows = [row_TGD for row_TGD in rows if row_TGD.numel()]
        if self._exact(rows):
            yield from map(_bytes, rows)
            return
        scales = [row_TGD.float().abs().amax(-1, keepdim=True) / 127 for row_TGD in rows]
        yield from map(_bytes, scales)
        for row_TGD, scale_TG1 in zip(rows, scales, strict=True):
            steps_TGD = row_TGD / scale_TG1.clamp(min=torch.finfo(torch.float32).tiny)
            yield _bytes(steps_TGD.round().to(torch.int8))

    def _exact(self, rows: Sequence[torch.Tensor]) -> bool:
        return self.precision is Precision.EXACT or rows[0].dtype is torch.int8

    def _unpack(self, data: memoryview, rows: Sequence[torch.Tensor]) -> None:
        """Write into `rows` what `_packed` gave for them: nothing in it tells shapes or types."""
        rows = [row_TGD for row_TGD in rows if row_TGD.numel()]
        at = 0

        def take(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            nonlocal at
            start, at = at, at + shape.numel() * dtype.itemsize
            return torch.frombuffer(
                data, dtype=dtype, count=shape.numel(), offset=start).view(shape)

        if self._exact(rows):
            for row_TGD in rows:
                row_TGD.copy_(take(row_TGD.shape, row_TGD.dtype))
        else:
            scales = [take(row_TGD[..., :1].shape, torch.float32) for row_TGD in rows]
            for row_TGD, scale_TG1 in zip(rows, scales, strict=True):
                row_TGD.copy_(take(row_TGD.shape, torch.int8) * scale_TG1)
        assert at == len(data), "sealed for this model, so of its size"


def _made(positions: Sequence[Position]) -> dict[bytes, torch.Tensor]:
    """Return the vectors that were made of each picture and recording, by its digest."""
    return {
        each.digest: each.vectors.made for each in positions
        if isinstance(each, MediaPosition) and isinstance(each.vectors, Encoded)
        and each.vectors.made is not None}


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.contiguous().numpy()  # whose buffer numpy's types do not tell of
    return memoryview(array).cast("B")


def _encode(positions: Sequence[Position]) -> bytes:
    """How many positions, then their names (see `core.encoded`)."""
    return b"".join([len(positions).to_bytes(4, "big"), *map(encoded, positions)])


def _decode(data: bytearray) -> tuple[list[Position], memoryview]:
    """Read what `_encode` wrote, and what stands behind it."""
    positions: list[Position] = []
    at = 4
    for _ in range(int.from_bytes(data[:4], "big")):
        id_ = int.from_bytes(data[at:at + 4], "big")
        at += 4
        if id_ == MEDIA:
            place, at = int.from_bytes(data[at:at + 4], "big"), at + 4 + DIGEST_BYTES
            positions.append(MediaPosition(bytes(data[at - DIGEST_BYTES:at]), place))
        else:
            positions.append(id_)
    return positions, memoryview(data)[at:]
