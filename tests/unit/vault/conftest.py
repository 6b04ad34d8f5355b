from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.vault.keys import Keyholder
from cloister.vault.store import Vault


class FakeKeys:
    """A key store in memory, as the package `keyring` would give it."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.held.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.held[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.held[service, username]


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys()


@pytest.fixture
def keyholder(tmp_path: Path) -> Keyholder:
    """A key file, and nothing else."""
    return Keyholder(keyfile=tmp_path / "vault.key")


@pytest.fixture
def vault(tmp_path: Path, keyholder: Keyholder) -> Iterator[Vault]:
    with Vault.create(tmp_path / "vault", keyholder) as made:
        yield made
