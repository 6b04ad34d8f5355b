"""A teacher's draws on a data set, recorded once: an unbiased and small stand-in for its logits.

Shapes: N positions, K distinct draws of the position that has most, V vocabulary.

At each position of an answer a number of tokens is drawn in proportion to the teacher's
probability (Random Sampling KD, arXiv 2503.16870): the mean of the student's loss on them is its
loss on the whole distribution, which the most likely tokens alone would not give.

A record holds one example: the number of distinct draws of each position (uint8), then the tokens
drawn (uint16, or uint32 above 65,536 entries), then how often each was (uint8).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from cloister.distill.data import IGNORE, Packed, batch, one_pass
from cloister.errors import LossNotFinite, SettingError, TrainingError
from cloister.files import disk_errors
from cloister.progress import silent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloister.distill.data import Batch
    from cloister.model.transformer import Decoder
    from cloister.pairs import Pair
    from cloister.progress import Progress
    from cloister.vault.namespace import Kind, Namespace

__all__ = ["Draws", "FileStore", "LogitStore", "Sampled", "SealedStore", "check_draws", "decode",
           "draw", "encode", "record"]

Header = Mapping[str, "str | int"]
"""The origin of a store's records: teacher, vocabulary, draws, seed, data."""

MOST = 255  # draws a position: a count is a byte
_NARROW = 1 << 16
_FRAME = struct.Struct("<QII")  # example, bytes of the record, its CRC-32


@dataclass(frozen=True)
class Draws:
    """Tokens drawn at N positions, and the share of each; unused places have the share 0."""

    ids: torch.Tensor = field(repr=False)  # int64[N, K]
    weights: torch.Tensor = field(repr=False)  # float32[N, K]; rows sum to 1

    def __getitem__(self, at: slice) -> Draws:
        return Draws(self.ids[at], self.weights[at])

    def to(self, device: torch.device) -> Draws:
        """Return the same on `device`."""
        return Draws(self.ids.to(device), self.weights.to(device))


class LogitStore(Protocol):
    """A store of records by example; they say much about the examples, and may need sealing."""

    def put(self, key: int, record: bytes) -> None:
        """Store a record.

        Raises:
            NotEnoughDisk: the disk is full; earlier records stay.
            VaultError: see `cloister.vault.namespace.Namespace`.
        """

    def get(self, key: int) -> bytes:
        """Return the record of an example.

        Raises:
            TrainingError: there is none.
            VaultDamaged: it is not what was written.
        """

    def __contains__(self, key: int) -> bool: ...

    def flush(self) -> None:
        """Flush every record to the disk."""


def draw(logits_NV: torch.Tensor, draws: int, rng: torch.Generator) -> Draws:
    """Draw tokens at each position, with replacement, in proportion to their probability."""
    probabilities_NV = logits_NV.float().softmax(-1)
    ids = torch.multinomial(
        probabilities_NV, draws, replacement=True, generator=rng).sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(-1) - 1
    counts = torch.zeros_like(ids).scatter_add_(-1, place, torch.ones_like(ids))
    distinct = torch.zeros_like(ids).scatter_(-1, place, ids)
    width = int(place.max()) + 1
    return Draws(distinct[:, :width], counts[:, :width].float() / draws)


def encode(drawn: Draws, draws: int, vocabulary: int) -> bytes:
    """Return the record of draws at the positions of one example."""
    counts = (drawn.weights * draws).round().to(torch.uint8)
    used = counts > 0
    ids = drawn.ids[used].numpy().astype("<u2" if vocabulary <= _NARROW else "<u4")
    return bytes(
        used.sum(-1).to(torch.uint8).numpy().tobytes() + ids.tobytes()
        + counts[used].numpy().tobytes()
    )


def decode(data: bytes, positions: int, vocabulary: int) -> Draws:
    """Read what `encode` wrote for an answer of `positions` tokens.

    Raises:
        TrainingError: the record is not of such an answer.
    """
    distinct = torch.frombuffer(bytearray(data[:positions]), dtype=torch.uint8).long()
    total = int(distinct.sum())
    size = 2 if vocabulary <= _NARROW else 4
    if len(distinct) != positions or len(data) != positions + total * (size + 1) or (
        int(distinct.min()) < 1
    ):
        raise TrainingError(
            "A record of the teacher's draws does not fit its example; delete the recorded "
            "logits and record them anew."
        )
    raw = bytearray(data[positions:positions + size * total])
    tokens = torch.frombuffer(raw, dtype=torch.uint16 if size == 2 else torch.uint32).long()
    counts = torch.frombuffer(bytearray(data[positions + size * total:]), dtype=torch.uint8)
    width = int(distinct.max())
    used = torch.arange(width) < distinct[:, None]
    ids, weights = torch.zeros(positions, width, dtype=torch.int64), torch.zeros(positions, width)
    ids[used], weights[used] = tokens, counts.float()
    return Draws(ids, weights / weights.sum(-1, keepdim=True))


class FileStore:
    """Records in one append-only file.

    The first line is their header; opening it with another is refused. A record that a kill cut
    short is dropped when the file is opened again.

    Raises:
        SettingError: the file holds another teacher's or data set's records.
        TrainingError: the file cannot be read.
    """

    def __init__(self, path: Path, *, header: Header) -> None:
        self.path = path
        first = json.dumps(dict(header), sort_keys=True).encode() + b"\n"
        self._places: dict[int, tuple[int, int]] = {}
        try:
            fresh = not path.exists() or (path.stat().st_size < len(first) and (
                first.startswith(path.read_bytes())))
            self._file = path.open("w+b" if fresh else "r+b", buffering=0)
        except OSError as error:
            raise TrainingError(
                f"{path.name} cannot be opened ({error.strerror}); check its folder."
            ) from None
        if fresh:
            self._write(0, first)
        self._file.seek(0)
        stored = self._file.read(4096).partition(b"\n")[0] + b"\n"
        if stored != first:
            raise SettingError(
                f"{path.name} holds the draws of {_differs(stored, header)}; delete it, or repeat "
                "the run that made it."
            )
        self._end = self._index(len(first))

    def put(self, key: int, record: bytes) -> None:
        """Store a record, see `LogitStore`."""
        frame = _FRAME.pack(key, len(record), zlib.crc32(record, key & 0xFFFFFFFF))
        self._write(self._end, frame + record)
        self._places[key] = self._end + len(frame), len(record)
        self._end += len(frame) + len(record)

    def get(self, key: int) -> bytes:
        """Return the record of an example, see `LogitStore`."""
        if key not in self._places:
            raise _unrecorded(key)
        at, size = self._places[key]
        return os.pread(self._file.fileno(), size, at)

    def __contains__(self, key: int) -> bool:
        return key in self._places

    def flush(self) -> None:
        """Flush every record to the disk."""
        with disk_errors(self.path.name):
            os.fsync(self._file.fileno())

    def _index(self, at: int) -> int:
        """Index every whole record, truncate the file after the last, and return its end."""
        self._file.seek(at)
        data = self._file.readall()
        place = 0
        while place + _FRAME.size <= len(data):
            key, size, crc = _FRAME.unpack_from(data, place)
            start = place + _FRAME.size
            if zlib.crc32(data[start:start + size], key & 0xFFFFFFFF) != crc or (
                start + size > len(data)
            ):
                break
            self._places[key] = at + start, size
            place = start + size
        self._file.truncate(at + place)
        return at + place

    def _write(self, at: int, data: bytes) -> None:
        with disk_errors(self.path.name):
            self._file.seek(at)
            view = memoryview(data)
            while view:
                view = view[self._file.write(view):]


class SealedStore:
    """A teacher's draws in the vault, an object a run (see `LogitStore`)."""

    def __init__(self, space: Namespace, kind: Kind, header: Header) -> None:
        self._space, self._kind = space, kind
        self._name = json.dumps(dict(header), sort_keys=True).encode()
        self._keys = set(space.numbers(kind, self._name))

    def put(self, key: int, record: bytes) -> None:
        """Store a record, see `LogitStore`."""
        self._space.put(self._kind, self._name, record, number=key)
        self._keys.add(key)

    def get(self, key: int) -> bytes:
        """Return the record of an example, see `LogitStore`."""
        record = self._space.get(self._kind, self._name, number=key)
        if record is None:
            raise _unrecorded(key)
        return record

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def flush(self) -> None:
        """Do nothing: the vault stores each record at once."""


class Sampled:
    """A teacher's recorded draws, in place of the teacher itself."""

    def __init__(self, store: LogitStore, data: Sequence[Pair], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._store, self._data = store, data

    def targets(self, keys: Sequence[int]) -> Draws:
        """Return the draws at the answers of examples, one after the other.

        Raises:
            TrainingError: an example has none.
        """
        parts = [
            decode(self._store.get(key), len(self._data[key][1]), self.vocabulary) for key in keys
        ]
        width = max(part.ids.shape[1] for part in parts)
        return Draws(*(
            torch.cat([
                torch.nn.functional.pad(getattr(part, name), (0, width - part.ids.shape[1]))
                for part in parts
            ]) for name in ("ids", "weights")
        ))


@torch.no_grad()
def record(
    teacher: Decoder, data: Sequence[Pair], store: LogitStore, *, draws: int = 16, seed: int = 0,
    tokens: int = 4096, progress: Progress = silent
) -> None:
    """Let `teacher` read every example that `store` does not have, `tokens` positions at a time.

    The draws of an example depend on the seed and its number alone, so a recording that was cut
    short resumes to the same records on the same kind of device.

    Raises:
        SettingError: draws out of bounds.
        LossNotFinite: the teacher gives NaN or infinity.
        NotEnoughDisk: the disk is full; the recording resumes when it is repeated.
    """
    check_draws(draws)
    shape, device = teacher.config.shape, teacher.embed.weight.device
    done = 0
    for length, rows in one_pass(data, tokens, 0, shape.context):
        part = batch(data, length, [row for row in rows if row]).to(device)
        if not all(key in store for key in part.keys):
            _record(teacher, data, part, store, draws, seed)
        done += len(part.keys)
        progress("record draws", done, len(data))
    store.flush()


def _record(
    teacher: Decoder, data: Sequence[Pair], part: Batch, store: LogitStore, draws: int, seed: int
) -> None:
    """Record draws at the answers of one batch."""
    learnt_BT = part.labels_BT != IGNORE
    attend = Packed(teacher.config, part.segments_BT)
    rows_ND = teacher.hidden(part.tokens_BT, 0, attend)[learnt_BT]
    at = 0
    for key in part.keys:
        size = len(data[key][1])
        if key not in store:
            logits_NV = teacher.logits(rows_ND[at:at + size]).float()
            if not logits_NV.isfinite().all():
                raise LossNotFinite(
                    f"The teacher's logits are not finite on example {key + 1}; check its weights.")
            rng = torch.Generator(logits_NV.device).manual_seed(seed * 1_000_000_007 + key)
            drawn = draw(logits_NV, draws, rng).to(torch.device("cpu"))
            store.put(key, encode(drawn, draws, teacher.config.shape.vocab_size))
        at += size


def check_draws(draws: int) -> None:
    """Raise SettingError unless so many draws a position can be recorded."""
    if not 1 <= draws <= MOST:
        raise SettingError(f"draws is {draws}; it must lie between 1 and {MOST}.")


def _unrecorded(key: int) -> TrainingError:
    return TrainingError(f"Example {key + 1} has no recorded draws; record them first.")


def _differs(stored: bytes, header: Header) -> str:
    """Name the fields in which a stored header differs from `header`."""
    try:
        other = json.loads(stored)
        names = [name for name in header if other.get(name) != header[name]]
    except (ValueError, AttributeError):
        names = []
    return f"another {' and '.join(names)}" if names else "something else"
