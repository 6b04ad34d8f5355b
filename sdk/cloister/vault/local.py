"""The vault of this user on this machine, where the settings say that it is."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from cloister.errors import SettingError, VaultError
from cloister.settings import Settings
from cloister.vault.database import Database
from cloister.vault.keychain import read_header
from cloister.vault.keys import Keyholder, Provider, system_keys
from cloister.vault.store import Vault, in_use

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.vault.keys import Header

__all__ = ["aside", "header", "keyholder", "open_vault"]


def keyholder(settings: Settings, ask: Callable[[], str] | None = None) -> Keyholder:
    """Return the key providers of this machine; `ask` is for a passphrase that is not set.

    A provider that the settings name is the only one; so is a passphrase that they give.

    Raises:
        SettingError: CLOISTER_PROVIDER names none.
    """
    passphrase, (keys, no_keys) = settings.passphrase, system_keys()
    name = settings.provider or (None if passphrase is None else Provider.PASSPHRASE)
    try:
        expected = None if name is None else Provider(name)
    except ValueError:
        raise SettingError(
            f"CLOISTER_PROVIDER is not one of {', '.join(Provider)}; choose one of them."
        ) from None
    return Keyholder(
        keyfile=settings.keyfile or settings.vault.with_suffix(".key"), expected=expected,
        passphrase=ask if passphrase is None else lambda: passphrase, keys=keys, no_keys=no_keys,
    )


def header(settings: Settings) -> Header | None:
    """Read what is known of the vault without its key; None where there is none.

    Raises:
        VaultError: it cannot be read.
    """
    if not os.path.lexists(settings.vault):
        return None
    database = Database(settings.vault / "vault.db")
    try:
        return read_header(database)
    finally:
        database.close()


def open_vault(
    passphrase: Callable[[], str] | None = None, *, settings: Settings | None = None,
    create: bool = False, accept_rollback: bool = False,
    notify: Callable[[str], None] = warnings.warn,
) -> Vault:
    """Open the vault of this user; where there is none and `create` allows it, make it.

    `passphrase` is asked for one where the environment does not tell it, `settings` are read from
    the environment where they are not given. `notify` is given a sentence for the user when a vault
    is made: who holds the key, and what that protects from.

    Raises:
        VaultError, SettingError: see `Vault`.
    """
    settings = settings or Settings.from_environment()
    holder = keyholder(settings, passphrase)
    if not create or os.path.lexists(settings.vault):
        return Vault(settings.vault, holder, accept_rollback=accept_rollback)
    vault = Vault.create(settings.vault, holder)
    notify(vault.notice)
    return vault


def aside(settings: Settings) -> str:
    """Move the vault out of the way, unread, and return its new name.

    Raises:
        VaultError: another process has it open.
        OSError: it cannot be moved.
    """
    if in_use(settings.vault):
        raise VaultError("Another process has the vault open; end that one first.")
    number = 1
    while os.path.lexists(other := settings.vault.with_name(f"vault-{number}")):
        number += 1
    settings.vault.rename(other)
    return other.name
