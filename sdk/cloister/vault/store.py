"""The vault: a directory of sealed objects, for several processes at a time (see FORMAT.md)."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

from cloister.errors import (
    NotEnoughDisk,
    OutputExists,
    SettingError,
    VaultDamaged,
    VaultError,
    VaultRolledBack,
    VaultUnsafe,
)
from cloister.files import sync
from cloister.vault.database import LEAVES, TYPES, Database
from cloister.vault.disk import (
    BEGIN_ANEW,
    check_home,
    check_place,
    check_private,
    file_system,
    private,
    write_failed,
)
from cloister.vault.keychain import Keychain, add
from cloister.vault.namespace import Namespace
from cloister.vault.seal import InvalidTag, context, open_record
from cloister.vault.segments import Segments
from cloister.vault.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from cloister.vault.keys import Header, Keyholder, Provider
    from cloister.vault.storage import Change

__all__ = ["Vault", "in_use"]

_DATABASE, _LOCK, _SEGMENTS = "vault.db", "lock", "segments"
_NAMESPACE = re.compile(r"[a-z0-9._-]{1,64}")


class Vault(Storage):
    """An open vault; close it, or use it in a `with` statement.

    Threads may share it, and processes may each open it; a fork may not go on with its parent's.
    """

    notice = ""
    """Of a vault that was just made: who holds its key, and what that protects from."""

    def __init__(
        self, directory: Path, keyholder: Keyholder, *,
        system: Callable[[Path], int] = file_system, accept_rollback: bool = False,
    ) -> None:
        """Open the vault in `directory`.

        Raises:
            VaultError: there is none, or it cannot be used: its subclasses say why.
            SettingError: its key provider is not there.
        """
        if not os.path.lexists(directory):
            raise VaultError(
                f"There is no vault at {directory}; make one with `cloister vault init`.")
        check_home(directory.parent)
        for place in (directory, directory / _SEGMENTS):
            check_place(place, system=system)
        db = Database(directory / _DATABASE)
        super().__init__(db, Keychain(db, keyholder), Segments(directory / _SEGMENTS))
        self.directory = directory
        self._lock = -1
        try:
            self._check(accept_rollback=accept_rollback)
            self._lock = _opened(directory / _LOCK)
            self._collect()
        except BaseException:
            self._let_go()
            raise

    @classmethod
    def create(
        cls, directory: Path, keyholder: Keyholder, provider: Provider | None = None, *,
        system: Callable[[Path], int] = file_system,
    ) -> Vault:
        """Make a new, empty vault; without a `provider`, with the first that there is.

        Its `notice` is to be shown to the user.

        Raises:
            OutputExists: something is there already.
            NotEnoughDisk: the disk is full; nothing is made.
            VaultError, SettingError: see `Vault`.
        """
        provider = provider or keyholder.choose()
        keyholder.check(provider)
        try:
            mended = cls._make(directory, keyholder, provider, system)
        except OSError as error:
            raise write_failed(error, "the vault") from None
        made = cls(directory, keyholder, system=system)
        made.notice = keyholder.notice(provider) + (
            f" Others could write to {directory.parent}; now only you can." if mended else "")
        return made

    @staticmethod
    def _make(
        directory: Path, keyholder: Keyholder, provider: Provider, system: Callable[[Path], int],
    ) -> bool:
        """Write a vault beside its place, and rename it there; whether its home had to be closed.

        Unlike `files.whole_directory` this never takes the place of one that another process made
        meanwhile.
        """
        taken = OutputExists(f"There is something at {directory} already; open that instead.")
        if os.path.lexists(directory):
            raise taken
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mended = check_home(directory.parent, mend=True)
        part = directory.with_name(f"{directory.name}.part-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        header = None
        try:
            check_place(part, system=system)
            (part / _SEGMENTS).mkdir(mode=0o700)
            header, kek = keyholder.create(provider, os.urandom(16), epoch=1)
            Database.create(part / _DATABASE, *Keychain.create(header, kek))
            sync(part)
            try:
                part.rename(directory)
            except OSError:
                raise taken from None
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            if header is not None:
                keyholder.drop(header)
            raise
        sync(directory.parent)
        return mended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Note what was used, and let go of files and keys; more than once does no harm."""
        if self._lock < 0 or self.db.forked:
            return
        try:
            with suppress(NotEnoughDisk):  # what was used is for the retention alone
                self._settle()
        finally:
            self._let_go()

    @property
    def header(self) -> Header:
        """What is known without the key."""
        return self.keys.header

    @property
    def generation(self) -> int:
        """How many writes were committed."""
        return self.keys.state()[0]

    def namespace(self, name: str = "default") -> Namespace:
        """Return the objects of one owner.

        Raises:
            SettingError: the name is not 1 to 64 of `a-z 0-9 . _ -`.
        """
        if not _NAMESPACE.fullmatch(name):
            raise SettingError(
                "A namespace's name is 1 to 64 of the characters a-z, 0-9, '.', '_' and '-'; "
                "choose another."
            )
        return Namespace(self, name, self.keys.tag("namespace", name)[:16])

    def namespaces(self) -> list[Namespace]:
        """Return the namespaces that have any object, sorted by name.

        Raises:
            VaultDamaged: a name is not what was written.
        """
        key, found = self.keys.names_key(), []
        for tag, sealed in self.db.rows("SELECT tag, sealed FROM namespaces"):
            try:
                name = open_record(key, context("name", self.keys.vault, tag), sealed).decode()
            except InvalidTag:
                raise VaultDamaged(
                    "A namespace's name is not what was written; put back a copy of the vault."
                ) from None
            found.append(Namespace(self, name, tag))
        return sorted(found, key=lambda namespace: namespace.name)

    def rotate(self, provider: Provider | None = None) -> Header:
        """Take a new key-encryption key, of another provider if one is given.

        Keys are wrapped anew; no content is written. New objects use a new epoch.

        Raises:
            SettingError: the new passphrase is the old one, or easy to guess.
            VaultError: the old key is not to be had, or the new one cannot be stored.
        """
        keyholder = self.keys.keyholder
        with self.db.lock:
            self.keys.state()
            old = self.header
            new, kek = keyholder.create(
                provider or old.provider, old.vault, epoch=old.epoch + 1, replaces=old)
            with self.change(durable=True) as change:
                # From the commit on both keys stay: one that failed may yet be found in the log.
                try:
                    if self.header != old:
                        raise VaultError("The vault was rotated by another process; try again.")
                    self._rewrap(change, new, kek)
                except BaseException:
                    keyholder.drop(new)
                    raise
            self.keys.adopt(new.encode(), kek)
            try:
                self.db.truncate()
            finally:
                keyholder.drop(old)
        return new

    def _settle(self) -> None:
        keyholder = self.keys.keyholder
        anchored = keyholder.anchors(self.header)
        if self.used or (anchored and self.generation != keyholder.anchor(self.header)):
            # What is noted outside must be on the disk: a power cut would look like a rollback.
            with self.change(durable=anchored):
                pass
        if anchored:
            keyholder.set_anchor(self.header, self.generation)

    def _rewrap(self, change: Change, header: Header, kek: bytes) -> None:
        for row in self.db.rows("SELECT namespace, kind, epoch, wrapped FROM keys"):
            new = self.keys.rewrapped(kek, row)
            change.count("keys", row, new)
            self.db.rows("REPLACE INTO keys VALUES (?, ?, ?, ?)", *new)
        change.header = header.encode()

    def _check(self, *, accept_rollback: bool) -> None:
        """Raise unless every row is one that was written, of its type, and none is missing."""
        self.keys.state()  # asks for the key, which may take a user's while
        # Before the rows are read: another process may close, and note a later one, meanwhile.
        last = self.keys.keyholder.anchor(self.header)
        with self.db.transaction(write=False):  # one moment for state and rows
            generation, root = self.keys.state()
            total = 0
            # Rows that a full reading finds may be hidden from a search by a damaged index.
            whole = self.db.rows("PRAGMA integrity_check(1)") == [("ok",)]
            try:
                for table, columns in LEAVES.items():
                    for row in self.db.rows(f"SELECT {columns} FROM {table}"):
                        # A number and its bytes give the same leaf, and sort elsewhere.
                        whole = whole and tuple(map(type, row)) == TYPES[table]
                        total = add(total, self.keys.leaf(table, row))
            except (AttributeError, TypeError, OverflowError):  # not even a type of SQLite's
                whole = False
        if total != root or not whole:
            raise VaultDamaged(
                "Rows of the vault are missing, repeated or from another time; put back a copy of "
                f"it, or {BEGIN_ANEW}."
            )
        if last is None or generation >= last:
            return
        if accept_rollback:
            self.keys.keyholder.set_anchor(self.header, generation, lower=True)
        else:
            raise VaultRolledBack(
                f"The vault is at write {generation} and was at {last} when it was last closed: it "
                "has been put back to an earlier state; put back the newer one, or accept this "
                "one with `cloister vault status --accept-rollback`."
            )

    def _collect(self) -> None:
        """Where no other process has the vault open, delete files and keys that nothing names."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            rows = self.db.rows("SELECT file FROM objects WHERE file NOT NULL")
            with suppress(OSError):  # they go another time
                for name in self.segments.orphans({row[0] for row in rows}):
                    self.segments.remove(name)
            self.keys.state()  # another process may have rotated and closed since it was read
            self.keys.keyholder.drop_others(self.header)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _let_go(self) -> None:
        self.db.close()
        self.keys.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def in_use(directory: Path) -> bool:
    """Tell whether a process has the vault in `directory` open."""
    try:
        with open(directory / _LOCK, "rb", opener=private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # without a lock that can be read, nobody has got so far
        return False
    return False


def _opened(path: Path) -> int:
    try:
        lock = private(str(path), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise VaultUnsafe(
            f"{path} cannot be opened ({error.strerror}); make it a regular file of yours, or "
            "delete it."
        ) from None
    try:
        check_private(os.fstat(lock), path)
    except BaseException:
        os.close(lock)
        raise
    return lock
