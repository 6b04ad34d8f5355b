"""The vault of this user on this machine, where the settings say that it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cloister.errors import VaultError
from cloister.vault.database import Database
from cloister.vault.keychain import read_header
from cloister.vault.keys import Keyholder, system_keys
from cloister.vault.store import Vault, in_use

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.settings import Settings
    from cloister.vault.keys import Header

__all__ = ["aside", "header", "keyholder", "open_vault"]


def keyholder(settings: Settings, ask: Callable[[], str] | None = None) -> Keyholder:
    """The key providers of this machine; `ask` is for a passphrase that the settings lack."""
    passphrase = settings.passphrase
    return Keyholder(
        keyfile=settings.keyfile or settings.vault.with_suffix(".key"),
        passphrase=ask if passphrase is None else lambda: passphrase, keys=system_keys(),
    )


def header(settings: Settings) -> Header | None:
    """What is known of the vault without its key; None where there is none.

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
    settings: Settings, ask: Callable[[], str] | None = None, *,
    create: bool = False, accept_rollback: bool = False,
) -> Vault:
    """The vault; made with the first key provider that there is, where `create` allows it and
    there is none.

    Raises:
        VaultError, SettingError: see `Vault`.
    """
    holder = keyholder(settings, ask)
    if create and not os.path.lexists(settings.vault):
        return Vault.create(settings.vault, holder)
    return Vault(settings.vault, holder, accept_rollback=accept_rollback)


def aside(settings: Settings) -> str:
    """Move the vault out of the way, unread, and say what it is called now.

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
