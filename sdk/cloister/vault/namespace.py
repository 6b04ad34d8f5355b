"""The objects of one owner: written, read and forgotten one by one."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

from cloister.errors import KeyDamaged, VaultDamaged, VaultError
from cloister.vault.database import LEAVES, SALTED_BYTES
from cloister.vault.seal import InvalidTag, context, new_key, open_record, seal_record, wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cloister.vault.database import Row
    from cloister.vault.retention import Retention
    from cloister.vault.seal import Buffer, Field
    from cloister.vault.storage import Change, Storage

__all__ = ["Entry", "Identity", "Kind", "Namespace"]

Identity = tuple[bytes, bytes]
"""Of an object: its tag and its wrapped key, which one that is made anew does not have."""

_T = TypeVar("_T")
_BYTES = (
    "size + coalesce((SELECT sum(length(sealed)) FROM records WHERE object = objects.tag), 0)")


class Kind(IntEnum):
    """What an object is."""

    HISTORY = 1
    PREFIX = 2
    RESPONSES = 3
    DISTILL = 4

    @property
    def durable(self) -> bool:
        """Tell whether a write must outlive a power cut; caches need not."""
        return self is Kind.HISTORY


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An object in a list of all. Its repr shows no text."""

    tag: bytes
    hours: int  # since it was written
    size_bytes: int  # on disk
    first: bytes | None = field(repr=False)  # record 0; None where there is none


class Namespace:
    """The objects of one owner. Names of objects are bytes, and never reach the disk.

    Raises (from its methods):
        NotEnoughDisk: the disk is full while something is written; what was there still is.
        VaultDamaged, KeyDamaged: what is read is not what was written.
        VaultError: see `Storage.change`.
    """

    def __init__(self, vault: Storage, name: str, tag: bytes) -> None:
        self.vault, self.name, self.tag = vault, name, tag

    def __repr__(self) -> str:
        return f"Namespace({self.name!r})"

    def put(self, kind: Kind, name: bytes, content: bytes, *, number: int = 0) -> None:
        """Write `content` as a record of an object, in place of the one that has its number."""
        with self.vault.change(durable=kind.durable) as change:
            self._write(change, kind, name, [content], number)

    def append(
        self, kind: Kind, name: bytes, contents: Iterable[bytes], *, after: int | None = None,
        to: Identity | None = None,
    ) -> Identity | None:
        """Write more records of an object, after those that there are: all of them, or none.

        Returns which object that was; None, and nothing is written, where there are not `after`
        records, or the object is not `to`: another process was here.
        """
        with self.vault.change(durable=kind.durable) as change:
            (number,), = self.vault.db.rows(
                "SELECT coalesce(max(number) + 1, 0) FROM records WHERE object = ?",
                self._tag(kind, name))
            if after not in (None, number) or to not in (None, self.identity(kind, name)):
                return None
            self._write(change, kind, name, contents, number)
            return self.identity(kind, name)

    def rewrite(
        self, kind: Kind, name: bytes, contents: Iterable[bytes], *, after: int, to: Identity,
        without: Iterable[tuple[Kind, bytes]] = (),
    ) -> Identity | None:
        """Write an object anew under a new key, so that nobody can unseal what it was before.

        `without` are objects that go at the same moment. Returns which object it is now; None, and
        nothing is written, where `append` would write nothing.
        """
        tag = self._tag(kind, name)
        with self.vault.change(durable=True) as change:
            if len(self.numbers(kind, name)) != after or self.identity(kind, name) != to:
                return None
            for each in without:
                self._remove(change, self._tag(*each))
            self._remove(change, tag)
            self._write(change, kind, name, contents, 0)
            identity = self.identity(kind, name)
        self.vault.db.truncate()
        return identity

    def get(self, kind: Kind, name: bytes, *, number: int = 0) -> bytes | None:
        """Return a record of an object; None where there is none."""
        found = self._read(kind, name, f"AND number = {int(number)}")
        return found[0] if found else None

    def records(self, kind: Kind, name: bytes) -> list[bytes]:
        """Return all records of an object, in order."""
        return self._read(kind, name, "ORDER BY number")

    def entries(self, kind: Kind) -> list[Entry]:
        """Return all objects of a kind, what was written last first; none counts as used for that.
        """
        now, found = _hour(), []
        for tag, hour, size in self.vault.db.rows(
            f"SELECT tag, CAST(hour AS INTEGER), {_BYTES} FROM objects "
            "WHERE namespace = ? AND kind = ? ORDER BY hour DESC, used DESC", self.tag, kind,
        ):
            first = self._records(kind, tag, "AND number = 0")
            found.append(Entry(
                tag=tag, hours=max(0, now - hour), size_bytes=size,
                first=first[0] if first else None))
        return found

    def numbers(self, kind: Kind, name: bytes) -> list[int]:
        """Return the number of each record of an object."""
        return [row[0] for row in self.vault.db.rows(
            "SELECT number FROM records WHERE object = ? ORDER BY number", self._tag(kind, name))]

    def put_large(
        self, kind: Kind, name: bytes, parts: Iterable[Buffer], *, bound: bytes = b"",
        owner: Identity | None = None,
    ) -> bool:
        """Write `parts`, one after the other, as an object of one file, sealed for `bound`.

        With an `owner`, only while that object exists; False where it was forgotten meanwhile.
        """
        vault, tag = self.vault, self._tag(kind, name)
        key = vault.keys.memory.lock(new_key())
        epoch = vault.keys.header.epoch
        file, size = vault.segments.write(
            key, self._place("segment", kind, epoch, tag, bound), parts, durable=kind.durable)
        try:
            with vault.change(durable=kind.durable) as change:
                wanted = owner is None or bool(vault.db.rows(
                    "SELECT 1 FROM objects WHERE tag = ? AND wrapped = ?", *owner))
                if wanted:
                    self._remove(change, tag)
                    self._insert(change, kind, epoch, tag, key, file, size)
                else:
                    change.files.append(file)
            return wanted
        except BaseException:
            # Committed it may be all the same. Where the database cannot say, it goes later.
            with suppress(VaultError, OSError):
                if not vault.db.rows("SELECT 1 FROM objects WHERE file = ?", file):
                    vault.segments.remove(file)
            raise

    def get_large(self, kind: Kind, name: bytes, *, bound: bytes = b"") -> bytearray | None:
        """Return the content of an object of one file; None where there is none."""
        vault, tag = self.vault, self._tag(kind, name)

        def read(rows: list[Row]) -> bytearray:
            (epoch, wrapped, file, size), = rows
            key = self._object_key(kind, epoch, tag, wrapped)
            content = vault.segments.read(
                file, key, self._place("segment", kind, epoch, tag, bound), size)
            vault.used.add(tag)
            return content

        return self._with_rows(
            read, "SELECT epoch, wrapped, file, size FROM objects WHERE tag = ? AND file NOT NULL",
            tag)

    def has(self, kind: Kind, name: bytes) -> bool:
        """Tell whether there is an object of that name."""
        return self.identity(kind, name) is not None

    def identity(self, kind: Kind, name: bytes) -> Identity | None:
        """Return which object of that name there is; None where there is none."""
        rows = self.vault.db.rows(
            "SELECT tag, wrapped FROM objects WHERE tag = ?", self._tag(kind, name))
        return rows[0] if rows else None

    def forget(
        self, kind: Kind, name: bytes,
        also: Callable[[list[bytes]], Iterable[tuple[Kind, bytes]]] = lambda records: (),
    ) -> bool:
        """Delete an object and its key; False where there was none.

        `also` tells from its records which other objects go with it, at the same moment.
        """
        with self.vault.change(durable=True) as change:
            for each in also(self.records(kind, name)):
                self._remove(change, self._tag(*each))
            found = self._remove(change, self._tag(kind, name))
        self.vault.db.truncate()
        return found

    def shred(self, kind: Kind | None = None) -> int:
        """Delete the keys of all objects, or of those of one kind; return the number of objects.

        With `history` goes `prefix`: KV state inverts back to the text.
        """
        db = self.vault.db
        kinds = {None: [*Kind], Kind.HISTORY: [Kind.HISTORY, Kind.PREFIX]}.get(kind, [kind])
        which = f"namespace = ? AND kind IN ({', '.join(f'{each:d}' for each in kinds)})"
        with self.vault.change(durable=True) as change:
            tags = [row[0] for row in db.rows(f"SELECT tag FROM objects WHERE {which}", self.tag)]
            self._delete(change, "keys", which, self.tag)
            self.vault.keys.forget()
            for tag in tags:
                self._remove(change, tag)
            if not db.rows("SELECT 1 FROM keys WHERE namespace = ?", self.tag):
                self._delete(change, "namespaces", "tag = ?", self.tag)
        db.truncate()
        return len(tags)

    def trim(self, kind: Kind, retention: Retention) -> int:
        """Delete what is too old, then what was used least recently until the rest is small enough.

        Returns the number of objects deleted.
        """
        now, left, gone = _hour(), 0, 0
        hours, most_bytes = retention.hours, retention.most_bytes
        with self.vault.change(durable=False) as change:
            for tag, hour, size in self.vault.db.rows(
                f"SELECT tag, CAST(hour AS INTEGER), {_BYTES} FROM objects "
                "WHERE namespace = ? AND kind = ? ORDER BY used DESC", self.tag, kind,
            ):
                # Where the clock went backwards, `now - hour` is negative, and nothing is old.
                old = hours is not None and now - hour > hours
                if old or (most_bytes is not None and left + size > most_bytes):
                    gone += self._remove(change, tag)
                else:
                    left += size
        if gone:
            self.vault.db.truncate(wait=False)
        return gone

    def sizes(self) -> dict[Kind, tuple[int, int]]:
        """Return the number of objects of each kind, and their bytes on disk."""
        return {Kind(kind): (count, size) for kind, count, size in self.vault.db.rows(
            f"SELECT kind, count(*), sum({_BYTES}) FROM objects WHERE namespace = ? GROUP BY kind",
            self.tag)}

    def everything(self, bound: bytes = b"") -> Iterator[bytes]:
        """Unseal every record, and every segment sealed for `bound`."""
        vault = self.vault
        for tag, kind, epoch, wrapped, file, size in vault.db.rows(
            "SELECT tag, kind, epoch, wrapped, file, size FROM objects WHERE namespace = ?",
            self.tag,
        ):
            key = self._object_key(kind, epoch, tag, wrapped)
            if file is not None:
                place = self._place("segment", kind, epoch, tag, bound)
                yield bytes(vault.segments.read(file, key, place, size))
            for number, version, sealed in vault.db.rows(
                "SELECT number, version, sealed FROM records WHERE object = ?", tag
            ):
                yield open_record(
                    key, self._place("record", kind, epoch, tag, number, version), sealed)

    def _tag(self, kind: Kind, name: bytes) -> bytes:
        return self.vault.keys.tag("object", self.tag, kind, name)

    def _place(self, label: str, kind: int, epoch: int, tag: bytes, *more: Field) -> bytes:
        return context(label, self.vault.keys.vault, self.tag, kind, epoch, tag, *more)

    def _object_key(
        self, kind: int, epoch: int, tag: bytes, wrapped: bytes, data: bytes | None = None
    ) -> bytes:
        """Unwrap an object's key; `data` is the data key, wrapped, where it was read with it."""
        keys = self.vault.keys
        return keys.unlock(keys.object_wrapping(self.tag, kind, epoch, tag, data), wrapped)

    def _read(self, kind: Kind, name: bytes, which: str) -> list[bytes]:
        tag = self._tag(kind, name)
        found = self._records(kind, tag, which)
        if found:
            self.vault.used.add(tag)
        return found

    def _records(self, kind: Kind, tag: bytes, which: str) -> list[bytes]:
        def read(rows: list[Row]) -> list[bytes]:
            epoch, wrapped, data = rows[0][:3]
            key, found = self._object_key(kind, epoch, tag, wrapped, data), []
            for *_, number, version, sealed in rows:
                place = self._place("record", kind, epoch, tag, number, version)
                try:
                    found.append(open_record(key, place, sealed))
                except InvalidTag:
                    raise VaultDamaged(
                        f"Record {number} of an object of kind {kind.name.lower()} is not what was "
                        "written; forget that object, or put back a copy of the vault."
                    ) from None
            return found

        return self._with_rows(
            read, "SELECT epoch, objects.wrapped, coalesce(keys.wrapped, x''), number, version, "
            "sealed FROM records JOIN objects ON object = tag "
            f"LEFT JOIN keys USING (namespace, kind, epoch) WHERE object = ? {which}", tag) or []

    def _with_rows(
        self, read: Callable[[list[Row]], _T], query: str, *values: object
    ) -> _T | None:
        """Return what `read` makes of rows; None where there are none.

        Keys and files are read after the rows, and another process may change all in between.
        """
        rows = self.vault.db.rows(query, *values)
        while rows:
            try:
                return read(rows)
            except (KeyDamaged, VaultDamaged):
                again = self.vault.db.rows(query, *values)
                if again == rows:
                    raise
                rows = again
        return None

    def _write(
        self, change: Change, kind: Kind, name: bytes, contents: Iterable[bytes], number: int
    ) -> None:
        """Write records from `number` on, the first in place of one that has that number."""
        db, tag = self.vault.db, self._tag(kind, name)
        rows = db.rows(
            "SELECT epoch, objects.wrapped, coalesce(keys.wrapped, x''), version, "
            f"substr(sealed, 1, {SALTED_BYTES}) FROM objects "
            "LEFT JOIN keys USING (namespace, kind, epoch) "
            "LEFT JOIN records ON object = tag AND number = ? WHERE tag = ?", number, tag)
        old: Row | None = None  # the record that has the number
        if rows:
            (epoch, wrapped, data, version, salted), = rows
            if version is not None:
                old = tag, number, version, salted
            key = self._object_key(kind, epoch, tag, wrapped, data)
            db.rows("UPDATE objects SET used = ?, hour = ? WHERE tag = ?",
                    change.generation, _hour(), tag)
        else:
            epoch, key = self.vault.keys.header.epoch, self.vault.keys.memory.lock(new_key())
            self._insert(change, kind, epoch, tag, key, None, 0)
        for place, content in enumerate(contents, start=number):
            # Only the first can stand in another's place: what is appended comes after all.
            version = old[2] + 1 if old else 1
            sealed = seal_record(
                key, self._place("record", kind, epoch, tag, place, version), content)
            db.rows("REPLACE INTO records VALUES (?, ?, ?, ?)", tag, place, version, sealed)
            change.count("records", old, (tag, place, version, sealed[:SALTED_BYTES]))
            old = None

    def _insert(
        self, change: Change, kind: Kind, epoch: int, tag: bytes, key: bytes, file: str | None,
        size: int,
    ) -> None:
        """Write a row for a new object, and the data key that it needs."""
        vault = self.vault
        data = vault.keys.wrapped(self.tag, kind, epoch)
        if not data:
            row = vault.keys.new_data_key(self.tag, kind, epoch)
            data = row[3]
            vault.db.rows("INSERT INTO keys VALUES (?, ?, ?, ?)", *row)
            change.count("keys", None, row)
            if not vault.db.rows("SELECT 1 FROM namespaces WHERE tag = ?", self.tag):
                sealed = seal_record(
                    vault.keys.names_key(), context("name", vault.keys.vault, self.tag),
                    self.name.encode())
                vault.db.rows("INSERT INTO namespaces VALUES (?, ?)", self.tag, sealed)
                change.count("namespaces", None, (self.tag, sealed[:SALTED_BYTES]))
        wrapped = wrap(vault.keys.object_wrapping(self.tag, kind, epoch, tag, data), key)
        vault.db.rows(
            "INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            tag, self.tag, kind, epoch, wrapped, file, size, change.generation, _hour())
        change.count("objects", None, (tag, self.tag, kind, epoch, wrapped, file or "", size))

    def _remove(self, change: Change, tag: bytes) -> bool:
        self._delete(change, "records", "object = ?", tag)
        rows = self._delete(change, "objects", "tag = ?", tag)
        change.files += [row[5] for row in rows if row[5]]
        self.vault.used.discard(tag)
        return bool(rows)

    def _delete(self, change: Change, table: str, which: str, *values: object) -> list[Row]:
        db = self.vault.db
        rows = db.rows(f"SELECT {LEAVES[table]} FROM {table} WHERE {which}", *values)
        for row in rows:
            change.count(table, row, None)
        db.rows(f"DELETE FROM {table} WHERE {which}", *values)
        return rows


def _hour() -> int:
    return int(time.time()) // 3600
