"""The vault's SQLite database: its tables, its connection, and its errors by our names."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cloister.errors import (
    CloisterError,
    NotEnoughDisk,
    VaultDamaged,
    VaultError,
    VaultVersionError,
)
from cloister.vault.disk import BEGIN_ANEW, check_private
from cloister.vault.keys import FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["LEAVES", "SALTED_BYTES", "Database"]

WAIT_S = 60.0  # for other processes' writes
SALTED_BYTES = 56  # first bytes of a sealed record, unlike those of any other
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE keys (
    namespace BLOB NOT NULL, kind INTEGER NOT NULL, epoch INTEGER NOT NULL, wrapped BLOB NOT NULL,
    PRIMARY KEY (namespace, kind, epoch)
) WITHOUT ROWID;
CREATE TABLE namespaces (tag BLOB PRIMARY KEY, sealed BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE objects (
    tag BLOB PRIMARY KEY, namespace BLOB NOT NULL, kind INTEGER NOT NULL, epoch INTEGER NOT NULL,
    wrapped BLOB NOT NULL, file TEXT, size INTEGER NOT NULL, used INTEGER NOT NULL,
    hour INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE records (
    object BLOB NOT NULL, number INTEGER NOT NULL, version INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (object, number)
);
"""
LEAVES = {  # what the state protects of each table's rows
    "keys": "namespace, kind, epoch, wrapped",
    "namespaces": f"tag, substr(sealed, 1, {SALTED_BYTES})",
    "objects": "tag, namespace, kind, epoch, wrapped, coalesce(file, ''), size",
    "records": f"object, number, version, substr(sealed, 1, {SALTED_BYTES})",
}

Row = tuple[Any, ...]


class Database:
    """One connection. Threads take turns; a fork's child may not use its parent's."""

    def __init__(self, path: Path) -> None:
        """Open the database at `path`.

        Raises:
            VaultUnsafe: one of its files is readable by others.
            VaultVersionError: another format.
            VaultDamaged, VaultError: it cannot be read.
        """
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            try:
                check_private(file.lstat(), file)
                if not os.access(file, os.W_OK):  # SQLite would make its log as unwritable
                    raise VaultError(
                        f"{file} cannot be written; make it and its disk writable again.")
            except FileNotFoundError:
                if not suffix:
                    raise _damaged(f"{path} is missing") from None
        self.lock, self._process, self._durable = threading.RLock(), os.getpid(), True
        with _named():
            self._db = sqlite3.connect(
                path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            if self.rows("PRAGMA user_version") != [(FORMAT,)]:
                raise VaultVersionError(
                    f"The vault has another format than the one that this release knows, {FORMAT}; "
                    "use the release that wrote it."
                )
            for setting in ("journal_mode = WAL", "secure_delete = ON", "temp_store = MEMORY",
                            "trusted_schema = OFF"):
                self.rows(f"PRAGMA {setting}")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(path: Path, keys: list[Row], meta: dict[str, bytes]) -> None:
        """A new database with rows of `keys` and `meta`, and nothing else."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with _named():
            db = sqlite3.connect(path, isolation_level=None)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT};")
                db.executemany("INSERT INTO keys VALUES (?, ?, ?, ?)", keys)
                db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                db.execute("COMMIT")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                db.close()

    @property
    def forked(self) -> bool:
        """Whether this is a child's copy of what its parent opened."""
        return os.getpid() != self._process

    def rows(self, query: str, *values: object) -> list[Row]:
        """Run one statement."""
        with self.lock:
            if self.forked:
                raise VaultError("This vault was opened before a fork; open it anew in the child.")
            try:
                return self._db.execute(query, values).fetchall()
            except (sqlite3.Error, UnicodeDecodeError) as error:  # damage may be in its messages
                raise _error(error) from None

    @contextmanager
    def transaction(self, *, durable: bool = True, write: bool = True) -> Iterator[None]:
        """All statements or none; a `durable` one outlives a power cut once it is committed."""
        with self.lock:
            if write and durable is not self._durable:
                self.rows(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self.rows("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self.rows("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self.rows("ROLLBACK")
                raise

    def truncate(self) -> None:
        """Leave nothing of what was deleted in the write-ahead log.

        Raises:
            VaultError: another process would not let go of it.
        """
        end = time.monotonic() + WAIT_S
        # It is not waited for where another process does the same.
        while self.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:
            if time.monotonic() >= end:
                raise VaultError(
                    "It is done, but another process keeps what was deleted in the vault's log; "
                    "end that process, and run `cloister vault status`."
                )
            time.sleep(0.01)

    def close(self) -> None:
        """Let go of the files."""
        with _named():
            self._db.close()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _error(error) from None


def _error(error: Exception) -> CloisterError:
    """The same, by our names."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if name == "SQLITE_FULL":
        return NotEnoughDisk("The disk filled while the vault was written; make room.")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return VaultError(
            f"Another process kept the vault busy for {WAIT_S:.0f} s; end it, and try again.")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return VaultError(
            "The vault's files cannot be written; check their owner, and that the disk is not "
            "read-only."
        )
    if name.startswith("SQLITE_IOERR"):
        return VaultError(
            "The disk failed while the vault was used; nothing of that write is kept: check the "
            "disk."
        )
    return _damaged(f"The vault's database is damaged ({name})")


def _damaged(what: str) -> VaultDamaged:
    return VaultDamaged(f"{what}; put back a copy of it, or {BEGIN_ANEW}.")
