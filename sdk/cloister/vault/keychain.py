"""The keys of an open vault, and what only they can make: tags, leaves, the signed state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.errors import KeyDamaged, KeyMissing, VaultDamaged
from cloister.vault.disk import BEGIN_ANEW
from cloister.vault.hygiene import LockedMemory
from cloister.vault.keys import Header
from cloister.vault.seal import InvalidTag, context, derive, mac, new_key, unwrap, wrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.vault.database import Database, Row
    from cloister.vault.keys import Keyholder
    from cloister.vault.seal import Field

__all__ = ["Keychain", "add", "read_header"]

_ROOT, _INDEX = b"root", b"index"
_SUM = 1 << 256


def add(root: int, leaf: int) -> int:
    """Return the root with one more leaf, or with a negative one, one less."""
    return (root + leaf) % _SUM


class Keychain:
    """Unwrapped keys, of the header that was read last."""

    def __init__(self, db: Database, keyholder: Keyholder) -> None:
        self.keyholder = keyholder
        self.memory = LockedMemory()
        self._db = db
        self._adopted: bytes | None = None  # the header, as it was read
        self._checked: bytes | None = None  # the state that was checked or signed last
        self._data_keys: dict[tuple[bytes, int, int], tuple[bytes, bytes]] = {}

    @staticmethod
    def create(header: Header, kek: bytes) -> tuple[list[Row], dict[str, bytes]]:
        """Return the rows of `keys` and `meta` of a new vault."""
        root_key, index_key = new_key(), new_key()
        keys: list[Row] = [
            (name, 0, 0, wrap(_wrapping(kek, header.vault, name), key))
            for name, key in ((_ROOT, root_key), (_INDEX, index_key))
        ]
        root = 0
        for row in keys:
            root = add(root, _leaf(root_key, "keys", row))
        encoded = header.encode()
        return keys, {"header": encoded, "state": _state(root_key, encoded, 0, root)}

    @property
    def header(self) -> Header:
        """What is known without a key; `state` reads it."""
        assert self._adopted is not None, "state() comes first"
        return self._header

    def state(self) -> tuple[int, int]:
        """Return generation and root; a rotation by another process is taken up first.

        Raises:
            VaultDamaged: they are not what was written.
            KeyDamaged, KeyMissing, WrongPassphrase: see `Keyholder.fetch`.
        """
        header, state = self._meta()
        while header != self._adopted:
            try:
                self.adopt(header, self.keyholder.fetch(Header.decode(header)))
            except (KeyDamaged, KeyMissing):
                before, (header, state) = header, self._meta()
                if header == before:
                    raise  # and no rotation came between
        generation, root = (int.from_bytes(state[at], "big") for at in (slice(8), slice(8, 40)))
        if state != self._checked:
            if state != _state(self._root_key, header, generation, root):
                raise VaultDamaged(
                    "The vault's state is not what was written; put back a copy of the vault, or "
                    f"{BEGIN_ANEW}."
                )
            self._checked = state
        return generation, root

    def _meta(self) -> tuple[bytes, bytes]:
        meta: dict[str, bytes] = dict(self._db.rows("SELECT name, CAST(value AS BLOB) FROM meta"))
        return meta.get("header", b""), meta.get("state", b"")

    def signed(self, generation: int, root: int, header: bytes | None = None) -> bytes:
        """Return the state to be written, under the header that there is, or another."""
        self._checked = _state(
            self._root_key, header or self._adopted or b"", generation, root)
        return self._checked

    def adopt(self, header: bytes, kek: bytes) -> None:
        """Take `header` as the vault's, and what `kek` unwraps."""
        self._header, self._kek = Header.decode(header), self.memory.lock(kek)
        self.vault = self._header.vault
        self._root_key, self._index_key = (
            self.unlock(_wrapping(kek, self.vault, name), self.wrapped(name, 0, 0))
            for name in (_ROOT, _INDEX)
        )
        self._adopted, self._checked = header, None

    def secrets(self) -> list[bytes]:
        """Return the keys that stay in memory."""
        return [self._kek, self._root_key, self._index_key,
                *(key for _, key in self._data_keys.values())]

    def locked(self) -> dict[str, str]:
        """Say how locking their memory went, and how many there are."""
        return self.memory.report(len(self.secrets()))

    def forget(self) -> None:
        """Drop all data keys from memory."""
        self._data_keys.clear()

    def close(self) -> None:
        """Drop all keys from memory."""
        self.forget()
        self._kek = self._root_key = self._index_key = b""
        self._adopted = None

    def tag(self, label: str, *fields: Field) -> bytes:
        """Return what a row is found by, 32 bytes."""
        return mac(self._index_key, context(label, *fields))

    def names_key(self) -> bytes:
        """Return the key that seals the names of namespaces."""
        return derive(self._root_key, self.vault, context("names"))

    def leaf(self, table: str, row: Sequence[Field]) -> int:
        """Return a row's share of the root."""
        return _leaf(self._root_key, table, row)

    def data_key(
        self, namespace: bytes, kind: int, epoch: int, wrapped: bytes | None = None
    ) -> bytes:
        """Return the data key of a namespace's kind at an epoch; `wrapped`, as just read.

        Raises:
            KeyDamaged: it is missing, or not what was written.
        """
        place = (namespace, kind, epoch)
        if wrapped is None:
            wrapped = self.wrapped(*place)
        # Beside what it was unwrapped from: other processes may shred, rotate and begin anew.
        source, key = self._data_keys.get(place, (b"", b""))
        if not wrapped or source != wrapped:
            self.state()  # after a rotation, the wrapping key is another
            wrapped = self.wrapped(*place)
            key = self.unlock(_wrapping(self._kek, self.vault, b"data", *place), wrapped)
            self._data_keys[place] = wrapped, key
        return key

    def new_data_key(self, namespace: bytes, kind: int, epoch: int) -> Row:
        """Return a row of `keys`, with a new key."""
        return self._data_row(
            self._kek, (namespace, kind, epoch), self.memory.lock(new_key()))

    def rewrapped(self, kek: bytes, row: Row) -> Row:
        """Return a row of `keys` under another key-encryption key."""
        namespace, kind, epoch, _ = row
        if kind:
            return self._data_row(
                kek, (namespace, kind, epoch), self.data_key(namespace, kind, epoch))
        key = self._root_key if namespace == _ROOT else self._index_key
        return namespace, kind, epoch, wrap(_wrapping(kek, self.vault, namespace), key)

    def object_wrapping(
        self, namespace: bytes, kind: int, epoch: int, tag: bytes, wrapped: bytes | None = None
    ) -> bytes:
        """Return the key that wraps an object's (see `data_key`)."""
        return derive(
            self.data_key(namespace, kind, epoch, wrapped), self.vault,
            context("wrap", "object", tag))

    def _data_row(self, kek: bytes, place: tuple[bytes, int, int], key: bytes) -> Row:
        return *place, wrap(_wrapping(kek, self.vault, b"data", *place), key)

    def wrapped(self, namespace: bytes, kind: int, epoch: int) -> bytes:
        """Return a data key as it stands in the database; nothing where it does not."""
        rows = self._db.rows(
            "SELECT wrapped FROM keys WHERE namespace = ? AND kind = ? AND epoch = ?",
            namespace, kind, epoch)
        return rows[0][0] if rows else b""

    def unlock(self, wrapping: bytes, wrapped: bytes) -> bytes:
        """Unwrap a key, into memory that is locked.

        Raises:
            KeyDamaged: it is not what was written.
        """
        try:
            return self.memory.lock(unwrap(wrapping, wrapped))
        except InvalidTag:
            raise KeyDamaged(
                "A key record of the vault is not what was written; put back a copy of the vault, "
                f"or {BEGIN_ANEW}."
            ) from None


def read_header(db: Database) -> Header:
    """Read what is known of a vault without its key.

    Raises:
        KeyDamaged, VaultVersionError: see `Header.decode`.
    """
    rows = db.rows("SELECT value FROM meta WHERE name = 'header'")
    return Header.decode(rows[0][0] if rows else b"")


def _wrapping(kek: bytes, vault: bytes, *name: Field) -> bytes:
    """Return the key that wraps a root, index or data key."""
    return derive(kek, vault, context("wrap", *name))


def _leaf(root_key: bytes, table: str, row: Sequence[Field]) -> int:
    return int.from_bytes(mac(root_key, context("leaf", table, *row)), "big")


def _state(root_key: bytes, header: bytes, generation: int, root: int) -> bytes:
    signed = generation.to_bytes(8, "big") + root.to_bytes(32, "big")
    return signed + mac(root_key, context("state", header, signed))
