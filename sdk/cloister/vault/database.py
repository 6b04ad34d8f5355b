"""The vault's SQLite database: its tables, its connection, and its errors by our names."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
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

__all__ = ["LEAVES", "SALTED_BYTES", "TYPES", "Database"]

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
TYPES: dict[str, tuple[type, ...]] = {  # of the same columns
    "keys": (bytes, int, int, bytes), "namespaces": (bytes, bytes),
    "objects": (bytes, bytes, int, int, bytes, str, int), "records": (bytes, int, int, bytes),
}
_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name"

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
            # A trigger or view of somebody else's would run with the keys at hand.
            for setting in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
                self.rows(f"PRAGMA {setting}")
            if self.rows("PRAGMA user_version") != [(FORMAT,)]:
                raise VaultVersionError(
                    f"The vault has another format than the one that this release knows, {FORMAT}; "
                    "use the release that wrote it."
                )
            if self.rows(_SCHEMA) != _schema():
                raise _damaged("The vault's tables are not those of its format")
            for setting in ("journal_mode = WAL", "secure_delete = ON", "temp_store = MEMORY"):
                self.rows(f"PRAGMA {setting}")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(path: Path, keys: list[Row], meta: dict[str, bytes]) -> None:
        """Write a new database with rows of `keys` and `meta`, and nothing else."""
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
        """Tell whether this is a child's copy of what its parent opened."""
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
        """Run all statements or none; `durable` ones outlive a power cut once committed."""
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

    def truncate(self, *, wait: bool = True) -> None:
        """Leave nothing of what was deleted in the database's file and write-ahead log.

        Without `wait`, only where no other process is in the way.

        Raises:
            VaultError: another process would not let go of it.
        """
        if not wait:
            with self.lock:
                self.rows("PRAGMA busy_timeout = 0")
                self.rows("PRAGMA wal_checkpoint(TRUNCATE)")
                self.rows(f"PRAGMA busy_timeout = {WAIT_S * 1000:.0f}")
            return
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


def _schema() -> list[Row]:
    """Return what `_SCHEMA` finds in a database that was just made."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_TABLES)
        return db.execute(_SCHEMA).fetchall()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _error(error) from None


def _error(error: Exception) -> CloisterError:
    """Return an error of SQLite's by our names."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if isinstance(error, sqlite3.ProgrammingError) and "closed database" in str(error):
        return VaultError("The vault was closed; open it again.")
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
