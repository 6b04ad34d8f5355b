"""Where the key-encryption key comes from: the system's key store, a passphrase, or a file.

A *keyholder* knows all three and asks for what it needs; a *header* says which one a vault uses.
FORMAT.md has the layout of what is derived.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from cloister.errors import (
    KeyDamaged,
    KeyMissing,
    SettingError,
    VaultError,
    VaultUnsafe,
    VaultVersionError,
    WrongPassphrase,
)
from cloister.vault.disk import BEGIN_ANEW, check_private, no_links, private, sync_directory
from cloister.vault.seal import KEY_BYTES, context, derive, new_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["FORMAT", "Header", "KeyStore", "Keyholder", "Provider", "system_keys"]

FORMAT = 1
_SERVICE = "cloister"
# Argon2id's second recommended option (RFC 9106, section 4): 64 MiB, 3 passes, 4 lanes.
_MEMORY_KIB, _PASSES, _LANES = 65536, 3, 4
_MOST_KIB = 4 << 20  # of a header that asks for more, nothing is believed
_LEAST_PRIORITY = 1  # keyring's own mark of a backend that is fit for use; plain text has less


class Provider(StrEnum):
    """Who holds the key-encryption key."""

    KEYRING = "keyring"
    PASSPHRASE = "passphrase"
    KEYFILE = "keyfile"


class KeyStore(Protocol):
    """The system's key store, as the package `keyring` gives it."""

    def get_password(self, service: str, username: str) -> str | None:
        """The secret of that name."""

    def set_password(self, service: str, username: str, password: str) -> None:
        """Keep a secret."""

    def delete_password(self, service: str, username: str) -> None:
        """Forget a secret."""


def system_keys() -> KeyStore | None:
    """The system's key store; None where there is none that is fit for secrets."""
    import keyring

    backend = keyring.get_keyring()
    each = getattr(backend, "backends", (backend,))  # a chain is as good as its worst
    return backend if all(one.priority >= _LEAST_PRIORITY for one in each) else None


@dataclass(frozen=True, kw_only=True)
class Header:
    """What can be known of a vault without its key."""

    vault: bytes  # 16 random bytes
    provider: Provider
    key_id: bytes  # of the key-encryption key, 16 bytes
    epoch: int  # from 1
    parameters: dict[str, int | str] = field(default_factory=dict)
    format: int = FORMAT

    def encode(self) -> bytes:
        """JSON and its SHA-256."""
        text = json.dumps({
            "epoch": self.epoch, "format": self.format, "key_id": self.key_id.hex(),
            "parameters": self.parameters, "provider": self.provider, "vault": self.vault.hex(),
        }, sort_keys=True).encode()
        return text + hashlib.sha256(text).digest()

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Read what `encode` wrote.

        Raises:
            KeyDamaged: it has changed.
            VaultVersionError: a format that this release does not know.
        """
        text, digest = data[:-32], data[-32:]
        if hashlib.sha256(text).digest() != digest:
            raise _damaged()
        try:
            held = json.loads(text)
            if held["format"] != FORMAT:
                raise VaultVersionError(
                    f"The vault has format {held['format']} and this release knows {FORMAT}; "
                    "use the release that wrote it."
                )
            return cls(
                vault=bytes.fromhex(held["vault"]), provider=Provider(held["provider"]),
                key_id=bytes.fromhex(held["key_id"]), epoch=held["epoch"],
                parameters=held["parameters"],
            )
        except (ValueError, KeyError, TypeError):
            raise _damaged() from None


def key_id(key: bytes, vault: bytes) -> bytes:
    """What tells one key-encryption key from another, 16 bytes."""
    return derive(key, vault, context("key id"))[:16]


@dataclass(frozen=True, kw_only=True)
class Keyholder:
    """The three providers, and how to reach them."""

    keyfile: Path
    passphrase: Callable[[], str] | None = None  # asked when it is needed
    keys: KeyStore | None = None

    def choose(self) -> Provider:
        """The first provider that there is."""
        if self.keys is not None:
            return Provider.KEYRING
        return Provider.KEYFILE if self.passphrase is None else Provider.PASSPHRASE

    def create(self, provider: Provider, vault: bytes, *, epoch: int) -> tuple[Header, bytes]:
        """A new key-encryption key, kept where `provider` keeps it, and the header that says so.

        Raises:
            SettingError: the provider is not there, or the passphrase is empty.
            VaultError: the key store or the disk refuses the key.
        """
        if provider is Provider.PASSPHRASE:
            parameters: dict[str, int | str] = {
                "salt": os.urandom(16).hex(), "memory_kib": _MEMORY_KIB, "passes": _PASSES,
                "lanes": _LANES,
            }
            key = self._stretch(parameters)
        else:
            key, parameters = new_key(), {}
        header = Header(
            vault=vault, provider=provider, key_id=key_id(key, vault), epoch=epoch,
            parameters=parameters,
        )
        text = base64.b64encode(key).decode()
        if provider is Provider.KEYRING:
            with self._store() as keys:
                keys.set_password(_SERVICE, _user(header), text)
        elif provider is Provider.KEYFILE:
            with self._changed() as held:
                held[_user(header)] = text
        return header, key

    def fetch(self, header: Header) -> bytes:
        """The key-encryption key of the vault that has `header`.

        Raises:
            WrongPassphrase, KeyMissing, KeyDamaged: each what it says.
            VaultUnsafe: others can read the key file.
            SettingError: no passphrase can be asked for, or there is no key store.
        """
        if header.provider is Provider.PASSPHRASE:
            key = self._stretch(header.parameters)
            if key_id(key, header.vault) != header.key_id:
                raise WrongPassphrase("The passphrase is not the vault's; try again.")
            return key
        name = _user(header)
        if header.provider is Provider.KEYRING:
            where = "the system's key store"
            with self._store() as keys:
                text = keys.get_password(_SERVICE, name)
        else:
            where = f"key file {self.keyfile.name}"
            text = self._read().get(name)
        if text is None:
            raise KeyMissing(
                f"The vault's key is not in {where}; put it back, or {BEGIN_ANEW}."
            )
        try:
            key = base64.b64decode(text, validate=True)
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES or key_id(key, header.vault) != header.key_id:
            raise KeyDamaged(
                f"The vault's key in {where} is not the one that was put there; put that back.")
        return key

    def drop(self, header: Header) -> None:
        """Forget the key of an earlier header, as far as it is kept anywhere."""
        name = _user(header)
        if header.provider is Provider.KEYRING:
            with self._store() as keys:
                if keys.get_password(_SERVICE, name) is not None:
                    keys.delete_password(_SERVICE, name)
        elif header.provider is Provider.KEYFILE:
            self._remove([name])

    def drop_others(self, header: Header) -> None:
        """Forget what a rotation that was cut off left of this vault in the key file."""
        if header.provider is not Provider.KEYFILE:
            return
        mine, own = f"{header.vault.hex()}/", _user(header)
        self._remove(
            [name for name in self._read() if name.startswith(mine) and name != own])

    def anchors(self, header: Header) -> bool:
        """Whether the vault's generation is noted outside of it."""
        return header.provider is Provider.KEYRING

    def anchor(self, header: Header) -> int | None:
        """The generation that was last closed; None where nothing outside the vault knows it.

        A header that names another provider may be an old one, put back: the key store is asked
        wherever there is one.
        """
        try:
            with self._store() as keys:
                text = keys.get_password(_SERVICE, _anchor(header))
        except (SettingError, VaultError):
            if self.anchors(header):
                raise
            return None
        return int(text) if text is not None and text.isdecimal() else None

    def set_anchor(self, header: Header, generation: int, *, lower: bool = False) -> None:
        """Note outside the vault that it has come to `generation`.

        A later one is not taken back, unless `lower` says so.
        """
        known = self.anchor(header)
        if known is None or lower or known < generation:
            with self._store() as keys:
                keys.set_password(_SERVICE, _anchor(header), str(generation))

    @contextmanager
    def _store(self) -> Iterator[KeyStore]:
        """The system's key store; what it raises has our name, and not its words."""
        if self.keys is None:
            raise SettingError(
                "This machine has no key store that is fit for secrets; choose the provider "
                "passphrase or keyfile."
            )
        try:
            yield self.keys
        except Exception as error:  # every backend has errors of its own
            raise VaultError(
                f"The system's key store did not do as it was asked ({type(error).__name__}); "
                "unlock it, or choose another provider."
            ) from None

    def _stretch(self, parameters: dict[str, int | str]) -> bytes:
        if self.passphrase is None:
            raise SettingError(
                "The vault needs its passphrase; run this in a terminal, or set "
                "CLOISTER_PASSPHRASE."
            )
        try:
            salt = bytes.fromhex(str(parameters["salt"]))
            memory, passes, lanes = (
                int(parameters[name]) for name in ("memory_kib", "passes", "lanes"))
            if memory > _MOST_KIB or passes > 100:
                raise ValueError
            stretcher = Argon2id(
                salt=salt, length=KEY_BYTES, iterations=passes, lanes=lanes, memory_cost=memory)
        except (KeyError, ValueError):
            raise _damaged() from None
        text = unicodedata.normalize("NFC", self.passphrase())
        if not text:
            raise SettingError("The passphrase is empty; choose another.")
        return stretcher.derive(text.encode("utf-8", "surrogatepass"))

    # The key file is JSON, a name and a key in base64 for each vault.

    def _read(self) -> dict[str, str]:
        try:
            with open(self.keyfile, "rb", opener=no_links) as file:
                check_private(os.fstat(file.fileno()), self.keyfile)
                held = json.loads(file.read())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise VaultUnsafe(
                f"Key file {self.keyfile.name} cannot be read ({error.strerror}); make it a "
                "regular file of yours with mode 0600."
            ) from None
        except ValueError:
            held = None
        if not isinstance(held, dict) or not all(isinstance(text, str) for text in held.values()):
            raise KeyDamaged(
                f"Key file {self.keyfile.name} is not what was written; put back a copy of it.")
        return held

    def _remove(self, names: list[str]) -> None:
        """Write the key file without `names`, if it holds any."""
        if not self._read().keys().isdisjoint(names):
            with self._changed() as held:
                for name in names:
                    held.pop(name, None)

    @contextmanager
    def _changed(self) -> Iterator[dict[str, str]]:
        """What the key file holds, to be changed by one process at a time and written back."""
        part, lock = (
            self.keyfile.with_name(f"{self.keyfile.name}.{end}") for end in ("part", "lock"))
        try:
            with open(lock, "wb", opener=private) as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                held = self._read()
                yield held
                part.unlink(missing_ok=True)
                with open(part, "xb", opener=private) as file:
                    file.write(json.dumps(held).encode())
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.keyfile)
                sync_directory(self.keyfile.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise VaultError(
                f"Key file {self.keyfile.name} cannot be written ({error.strerror}); make room, "
                "or choose another place."
            ) from None


def _user(header: Header) -> str:
    return f"{header.vault.hex()}/{header.key_id.hex()}"


def _anchor(header: Header) -> str:
    return f"{header.vault.hex()}/generation"


def _damaged() -> KeyDamaged:
    return KeyDamaged(
        "The vault's header is not what was written; put back a copy of the vault, or "
        f"{BEGIN_ANEW}."
    )
