"""What a vault and its namespaces write through: keys, database, segments, one change at a time."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cloister.vault.keychain import add

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.vault.database import Database
    from cloister.vault.keychain import Keychain
    from cloister.vault.seal import Field
    from cloister.vault.segments import Segments

__all__ = ["Change", "Storage"]


class Storage:
    """The parts of an open vault, and the one way to change what they hold."""

    def __init__(self, db: Database, keys: Keychain, segments: Segments) -> None:
        self.db, self.keys, self.segments = db, keys, segments
        self.used: set[bytes] = set()  # tags of objects that were read since the last change

    @contextmanager
    def change(self, *, durable: bool) -> Iterator[Change]:
        """Write all that the block does, or nothing of it.

        Raises:
            NotEnoughDisk: the disk is full; what was there still is.
            VaultError: another process would not let go, or the disk failed.
        """
        with self.db.transaction(durable=durable):
            change = Change(self)
            yield change
            change.finish()
        self.used.clear()
        for name in change.files:
            with suppress(OSError):  # no row names it: it goes at a later opening
                self.segments.remove(name)


class Change:
    """What one write does to the vault's state."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        generation, self._root = storage.keys.state()
        self.generation = generation + 1
        self.header: bytes | None = None  # a new one
        self.files: list[str] = []  # to be deleted once all is committed

    def count(self, table: str, old: Sequence[Field] | None, new: Sequence[Field] | None) -> None:
        """Take one row of `table` out of the root hash, and another into it."""
        leaf = self._storage.keys.leaf
        if old is not None:
            self._root = add(self._root, -leaf(table, old))
        if new is not None:
            self._root = add(self._root, leaf(table, new))

    def finish(self) -> None:
        """Write the new state."""
        db, keys = self._storage.db, self._storage.keys
        for tag in list(self._storage.used):  # other threads read meanwhile
            db.rows("UPDATE objects SET used = ? WHERE tag = ?", self.generation, tag)
        if self.header is not None:
            db.rows("UPDATE meta SET value = ? WHERE name = 'header'", self.header)
        db.rows(
            "UPDATE meta SET value = ? WHERE name = 'state'",
            keys.signed(self.generation, self._root, self.header))
