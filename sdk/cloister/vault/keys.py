"""Where the key-encryption key comes from: the system's key store, a passphrase, or a file.

A *keyholder* reaches all three; a *header* says which one a vault uses. FORMAT.md has the layout of
what is derived.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import unicodedata
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import msgspec
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from cloister.errors import (
    KeyDamaged,
    KeyMissing,
    OutputUnwritable,
    SettingError,
    VaultError,
    VaultUnsafe,
    VaultVersionError,
    WrongPassphrase,
)
from cloister.files import whole_file
from cloister.vault.disk import BEGIN_ANEW, check_private, private
from cloister.vault.seal import KEY_BYTES, context, derive, new_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["FORMAT", "Header", "KeyStore", "Keyholder", "Provider", "system_keys"]

FORMAT = 1
_SERVICE = "cloister"
# Argon2id's second recommended option (RFC 9106, section 4): 64 MiB, 3 passes, 4 lanes.
_MEMORY_KIB, _PASSES, _LANES = 65536, 3, 4
_MOST_KIB = 4 << 20  # a header that asks for more is not believed
_LEAST_CHARACTERS = 8  # of a passphrase (NIST SP 800-63B, section 3.1.1)
_LEAST_PRIORITY = 1  # keyring's own mark of a backend that is fit for use; plain text has less
_NO_KEYS = "This machine has no key store that is fit for secrets"


class Provider(StrEnum):
    """Who holds the key-encryption key."""

    KEYRING = "keyring"
    PASSPHRASE = "passphrase"
    KEYFILE = "keyfile"

    @property
    def protects(self) -> str:
        """What it protects from, as the end of a sentence."""
        return {
            "keyring": "whoever copies the disk learns nothing; programs of this user can ask the "
                       "system's key store",
            "passphrase": "whoever copies the disk must guess the passphrase, at 64 MiB a guess",
            "keyfile": "whoever copies the vault alone learns nothing; whoever copies the key file "
                       "too reads all of it",
        }[self]


class KeyStore(Protocol):
    """The system's key store, as the package `keyring` gives it."""

    def get_password(self, service: str, username: str) -> str | None:
        """Return the secret of that name."""

    def set_password(self, service: str, username: str, password: str) -> None:
        """Store a secret."""

    def delete_password(self, service: str, username: str) -> None:
        """Delete a secret."""


def system_keys() -> tuple[KeyStore | None, str]:
    """Return the system's key store; where none is fit for secrets, None and the reason."""
    try:
        import keyring

        backend = keyring.get_keyring()
        each = getattr(backend, "backends", (backend,))  # a chain is as good as its worst
        fit = all(one.priority >= _LEAST_PRIORITY for one in each)
    except Exception as error:  # of a backend that is set up and not installed, for instance
        return None, (
            f"The key store that the package keyring is set up for cannot be loaded "
            f"({type(error).__name__})")
    return (backend, "") if fit else (None, _NO_KEYS)


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON of a header."""

    epoch: int
    format: int
    key_id: str
    parameters: dict[str, int | str]
    provider: Provider
    vault: str


class _Versioned(msgspec.Struct):
    """The part of it that every format has."""

    format: int


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
        """Return JSON and its SHA-256."""
        text = msgspec.json.encode(_Stored(
            epoch=self.epoch, format=self.format, key_id=self.key_id.hex(),
            parameters=self.parameters, provider=self.provider, vault=self.vault.hex(),
        ), order="deterministic")
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
            version = msgspec.json.decode(text, type=_Versioned).format
            if version != FORMAT:
                raise VaultVersionError(
                    f"The vault has format {version} and this release knows {FORMAT}; use the "
                    "release that wrote it."
                )
            stored = msgspec.json.decode(text, type=_Stored)
            return cls(
                vault=bytes.fromhex(stored.vault), provider=stored.provider,
                key_id=bytes.fromhex(stored.key_id), epoch=stored.epoch,
                parameters=stored.parameters,
            )
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            raise _damaged() from None


def key_id(key: bytes, vault: bytes) -> bytes:
    """Return what tells one key-encryption key from another, 16 bytes."""
    return derive(key, vault, context("key id"))[:16]


@dataclass(frozen=True, kw_only=True)
class Keyholder:
    """The three providers, and how to reach them."""

    keyfile: Path
    passphrase: Callable[[], str] | None = None  # asked when it is needed
    keys: KeyStore | None = None
    no_keys: str = _NO_KEYS  # why there are none
    expected: Provider | None = None  # no other is used

    def choose(self) -> Provider:
        """Return the provider that is expected, or else the first that there is."""
        if self.expected is not None:
            return self.expected
        if self.keys is not None:
            return Provider.KEYRING
        return Provider.KEYFILE if self.passphrase is None else Provider.PASSPHRASE

    def check(self, provider: Provider) -> None:
        """Raise unless `provider` is the one that is expected, if one is.

        Raises:
            VaultUnsafe: it is another.
        """
        if self.expected not in (None, provider):
            raise VaultUnsafe(
                f"CLOISTER_PASSPHRASE or CLOISTER_PROVIDER asks for the key provider "
                f"{self.expected} and this vault has {provider}: it may have been put in the place "
                f"of yours; if it is the one you want, set CLOISTER_PROVIDER={provider}."
            )

    def notice(self, provider: Provider) -> str:
        """Return what a user should know of a new vault: who holds its key, and what that means."""
        fallen = provider is Provider.KEYFILE and self.keys is None and self.expected is None
        return (
            f"A vault was made, whose key provider is {provider}: {provider.protects}; "
            "`cloister vault rotate --provider` takes another."
            + (f" {self.no_keys}, so a key file is used." if fallen else ""))

    def create(
        self, provider: Provider, vault: bytes, *, epoch: int, replaces: Header | None = None
    ) -> tuple[Header, bytes]:
        """Make a key-encryption key, stored by `provider`, and the header that says so.

        Raises:
            SettingError: the provider is not there, or the passphrase is easy to guess, or opens
                the vault of the header that this one `replaces`.
            VaultError: the key store or the disk refuses the key.
        """
        if provider is Provider.PASSPHRASE:
            parameters: dict[str, int | str] = {
                "salt": os.urandom(16).hex(), "memory_kib": _MEMORY_KIB, "passes": _PASSES,
                "lanes": _LANES,
            }
            text = self._asked()
            _check_strength(text)
            if replaces is not None and replaces.provider is provider and replaces.key_id == key_id(
                    _stretch(text, replaces.parameters), replaces.vault):
                raise SettingError("The new passphrase is the old one; choose another.")
            key = _stretch(text, parameters)
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
            with self._changed() as stored:
                stored[_user(header)] = text
        return header, key

    def fetch(self, header: Header) -> bytes:
        """Return the key-encryption key of the vault that has `header`.

        Raises:
            WrongPassphrase, KeyMissing, KeyDamaged: each what it says.
            VaultUnsafe: others can read the key file, or another provider is expected.
            SettingError: no passphrase can be asked for, or there is no key store.
        """
        self.check(header.provider)
        if header.provider is Provider.PASSPHRASE:
            key = _stretch(self._asked(), header.parameters)
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
        """Delete the key of an earlier header, wherever one is stored."""
        name = _user(header)
        if header.provider is Provider.KEYRING:
            with self._store() as keys:
                if keys.get_password(_SERVICE, name) is not None:
                    keys.delete_password(_SERVICE, name)
        elif header.provider is Provider.KEYFILE:
            self._remove(lambda each: each == name)

    def drop_others(self, header: Header) -> None:
        """Delete what a rotation that was cut off left of this vault in the key file."""
        if header.provider is Provider.KEYFILE:
            vault, own = f"{header.vault.hex()}/", _user(header)
            self._remove(lambda name: name.startswith(vault) and name != own)

    def anchors(self, header: Header) -> bool:
        """Tell whether the vault's generation is noted outside of it."""
        return header.provider is Provider.KEYRING

    def anchor(self, header: Header) -> int | None:
        """Return the generation that was last closed; None where only the vault knows it.

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
        noted = self.anchor(header)
        if noted is None or lower or noted < generation:
            with self._store() as keys:
                keys.set_password(_SERVICE, _anchor(header), str(generation))

    @contextmanager
    def _store(self) -> Iterator[KeyStore]:
        """Reach the system's key store; what it raises has our name, and not its words."""
        if self.keys is None:
            raise SettingError(f"{self.no_keys}; choose the provider passphrase or keyfile.")
        try:
            yield self.keys
        except Exception as error:  # every backend has errors of its own
            raise VaultError(
                f"The system's key store did not do as it was asked ({type(error).__name__}); "
                "unlock it, or choose another provider."
            ) from None

    def _asked(self) -> str:
        """Return the passphrase, in one form however it was typed."""
        if self.passphrase is None:
            raise SettingError(
                "The vault needs its passphrase; run this in a terminal, or set "
                "CLOISTER_PASSPHRASE."
            )
        text = unicodedata.normalize("NFC", self.passphrase())
        if not text:
            raise SettingError("The passphrase is empty; choose another.")
        return text

    # The key file is JSON, a name and a key in base64 for each vault.

    def _read(self) -> dict[str, str]:
        name = self.keyfile.name
        try:
            with open(self.keyfile, "rb", opener=private) as file:
                check_private(os.fstat(file.fileno()), self.keyfile)
                return msgspec.json.decode(file.read(), type=dict[str, str])
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise VaultUnsafe(
                f"Key file {name} cannot be read ({error.strerror}); make it a regular file of "
                "yours with mode 0600."
            ) from None
        except (ValueError, RecursionError):
            raise KeyDamaged(
                f"Key file {name} is not what was written; put back a copy of it.") from None

    def _remove(self, unwanted: Callable[[str], bool]) -> None:
        """Write the key file without the names that are `unwanted`, if it has any."""
        if any(map(unwanted, self._read())):
            with self._changed() as stored:
                for name in list(filter(unwanted, stored)):
                    del stored[name]

    @contextmanager
    def _changed(self) -> Iterator[dict[str, str]]:
        """What the key file holds, to be changed by one process at a time and written back."""
        name, parent = self.keyfile.name, self.keyfile.parent
        orphan = re.compile(re.escape(f".{name}.") + r"\w{8}")  # of a process that was killed
        try:
            with open(parent / f"{name}.lock", "wb", opener=private) as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                for path in parent.iterdir():
                    if orphan.fullmatch(path.name):
                        path.unlink()
                stored = self._read()
                yield stored
                with _wiped(self.keyfile), whole_file(self.keyfile, private=True) as file:
                    file.write(msgspec.json.encode(stored))
        except (OSError, OutputUnwritable) as error:
            reason = getattr(error.__cause__ or error, "strerror", None)
            raise VaultError(
                f"Key file {name} cannot be written ({reason}); make room, or choose another place."
            ) from None


@contextmanager
def _wiped(path: Path) -> Iterator[None]:
    """Overwrite the file at `path` once another has its place, unless it has another name too."""
    with open(path, "r+b", opener=private) if path.exists() else nullcontext() as old:
        yield
        if old is not None and not (status := os.fstat(old.fileno())).st_nlink:
            with suppress(OSError):  # the new file is there: the rest is as good as it can be
                old.write(bytes(status.st_size))
                old.flush()
                os.fsync(old.fileno())


def _check_strength(passphrase: str) -> None:
    """Raise unless a new passphrase is long enough and does not just repeat or count.

    Raises:
        SettingError: it is easy to guess.
    """
    size = len(passphrase)
    repeats = any(passphrase[n:] == passphrase[:-n] for n in range(1, size // 2 + 1))
    steps = {ord(after) - ord(before) for before, after in pairwise(passphrase)}
    if size < _LEAST_CHARACTERS or repeats or len(steps) == 1:
        raise SettingError(
            f"That passphrase is easy to guess; choose one of {_LEAST_CHARACTERS} characters or "
            "more that do not repeat or count up, such as five words that have nothing in common."
        )


def _stretch(passphrase: str, parameters: dict[str, int | str]) -> bytes:
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
    return stretcher.derive(passphrase.encode("utf-8", "surrogatepass"))


def _user(header: Header) -> str:
    return f"{header.vault.hex()}/{header.key_id.hex()}"


def _anchor(header: Header) -> str:
    return f"{header.vault.hex()}/generation"


def _damaged() -> KeyDamaged:
    return KeyDamaged(
        "The vault's header is not what was written; put back a copy of the vault, or "
        f"{BEGIN_ANEW}."
    )
