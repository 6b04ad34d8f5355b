"""A key is where its provider keeps it, and each way to lose it has a name of its own."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.errors import (
    KeyDamaged,
    KeyMissing,
    SettingError,
    VaultError,
    VaultUnsafe,
    VaultVersionError,
    WrongPassphrase,
)
from cloister.vault.keys import Header, Keyholder, Provider

VAULT = bytes(range(16))


@pytest.fixture
def all_three(tmp_path: Path, keys) -> Keyholder:
    return Keyholder(
        keyfile=tmp_path / "vault.key", passphrase=lambda: "correct horse", keys=keys)


@pytest.mark.parametrize("provider", list(Provider))
def test_what_is_created_is_fetched_until_it_is_dropped(
    all_three: Keyholder, provider: Provider
) -> None:
    header, key = all_three.create(provider, VAULT, epoch=1)
    other, other_key = all_three.create(provider, bytes(16), epoch=1)
    assert key != other_key
    assert all_three.fetch(Header.decode(header.encode())) == key
    all_three.drop(other)
    assert all_three.fetch(header) == key
    all_three.drop(header)
    all_three.drop(header)
    if provider is not Provider.PASSPHRASE:
        with pytest.raises(KeyMissing, match="--beside"):
            all_three.fetch(header)


def test_providers_are_tried_in_order(tmp_path: Path, keys) -> None:
    file = tmp_path / "k"
    assert Keyholder(keyfile=file, passphrase=str, keys=keys).choose() is Provider.KEYRING
    assert Keyholder(keyfile=file, passphrase=str).choose() is Provider.PASSPHRASE
    assert Keyholder(keyfile=file).choose() is Provider.KEYFILE


def test_a_wrong_passphrase_is_told_from_damage(all_three: Keyholder) -> None:
    header, _ = all_three.create(Provider.PASSPHRASE, VAULT, epoch=1)
    with pytest.raises(WrongPassphrase):
        replace(all_three, passphrase=lambda: "correct house").fetch(header)
    with pytest.raises(SettingError, match="CLOISTER_PASSPHRASE"):
        replace(all_three, passphrase=None).fetch(header)
    with pytest.raises(SettingError, match="empty"):
        replace(all_three, passphrase=str).create(Provider.PASSPHRASE, VAULT, epoch=1)
    for wrong in ({"memory_kib": 1 << 40}, {"salt": "no"}, {"lanes": 0}, {"passes": "many"}):
        with pytest.raises(KeyDamaged):
            all_three.fetch(replace(header, parameters={**header.parameters, **wrong}))


def test_one_passphrase_typed_in_two_ways_is_one(all_three: Keyholder) -> None:
    """Keyboards differ in how they compose letters."""
    header, key = replace(all_three, passphrase=lambda: "caf\u00e9 con leche").create(
        Provider.PASSPHRASE, VAULT, epoch=1)
    assert replace(all_three, passphrase=lambda: "cafe\u0301 con leche").fetch(header) == key


@pytest.mark.parametrize("provider", [Provider.KEYRING, Provider.KEYFILE])
def test_another_key_in_its_place_is_damage(
    all_three: Keyholder, provider: Provider, keys
) -> None:
    header, _ = all_three.create(provider, VAULT, epoch=1)
    name = f"{header.vault.hex()}/{header.key_id.hex()}"
    for wrong in ("AAAA", "not base64 \u00e9", "A" * 43 + "="):
        keys.held["cloister", name] = wrong
        if provider is Provider.KEYFILE:
            all_three.keyfile.write_text(json.dumps({name: wrong}))
        with pytest.raises(KeyDamaged):
            all_three.fetch(header)


def test_a_key_store_that_fails_is_named_and_its_words_are_not_shown(tmp_path: Path) -> None:
    class Locked:
        def get_password(self, *_: str) -> str:
            raise RuntimeError("secret detail")

        set_password = delete_password = get_password

    holder = Keyholder(keyfile=tmp_path / "k", keys=Locked())
    header, _ = Keyholder(keyfile=tmp_path / "k").create(Provider.KEYFILE, VAULT, epoch=1)
    for action in (
        lambda: holder.create(Provider.KEYRING, VAULT, epoch=1),
        lambda: holder.fetch(replace(header, provider=Provider.KEYRING)),
    ):
        with pytest.raises(VaultError, match="RuntimeError") as caught:
            action()
        assert "secret" not in str(caught.value)
    with pytest.raises(SettingError, match="passphrase or keyfile"):
        replace(holder, keys=None).fetch(replace(header, provider=Provider.KEYRING))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_key_file_that_others_can_read_is_refused_with_what_to_run(
    all_three: Keyholder, mode: int
) -> None:
    header, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    assert all_three.keyfile.stat().st_mode & 0o777 == 0o600
    all_three.keyfile.chmod(mode)
    with pytest.raises(VaultUnsafe, match="chmod 600"):
        all_three.fetch(header)


def test_a_link_or_directory_is_no_key_file(all_three: Keyholder, tmp_path: Path) -> None:
    header, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    moved = all_three.keyfile.rename(tmp_path / "elsewhere")
    all_three.keyfile.symlink_to(moved)
    with pytest.raises(VaultUnsafe):
        all_three.fetch(header)
    all_three.keyfile.unlink()
    all_three.keyfile.mkdir()
    with pytest.raises(VaultUnsafe):
        all_three.fetch(header)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": 1}', b"\xff"])
def test_a_damaged_key_file_is_named_and_never_written_over(
    all_three: Keyholder, content: bytes
) -> None:
    header, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    all_three.keyfile.write_bytes(content)
    with pytest.raises(KeyDamaged):
        all_three.fetch(header)
    with pytest.raises(KeyDamaged):
        all_three.create(Provider.KEYFILE, bytes(16), epoch=1)
    assert all_three.keyfile.read_bytes() == content


def test_a_changed_header_is_damage_and_a_newer_one_another_version(all_three: Keyholder) -> None:
    header, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    data = header.encode()
    assert Header.decode(data) == header
    for at in range(len(data)):
        with pytest.raises(KeyDamaged):
            Header.decode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    with pytest.raises(KeyDamaged):
        Header.decode(b"")
    with pytest.raises(VaultVersionError, match="format 2"):
        Header.decode(replace(header, format=2).encode())


def test_only_a_key_store_remembers_how_far_a_vault_has_come(all_three: Keyholder) -> None:
    header, _ = all_three.create(Provider.KEYRING, VAULT, epoch=1)
    assert all_three.anchor(header) is None
    all_three.set_anchor(header, 7)
    all_three.set_anchor(header, 5)
    assert all_three.anchor(header) == 7
    all_three.set_anchor(header, 3, lower=True)
    assert all_three.anchor(header) == 3
    file, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    assert (all_three.anchors(header), all_three.anchors(file)) == (True, False)
    assert all_three.anchor(file) == 3  # it may be the header of a vault that had a key store once
    assert replace(all_three, keys=None).anchor(file) is None
    with pytest.raises(SettingError):
        replace(all_three, keys=None).anchor(header)


def test_vaults_that_are_made_at_once_do_not_lose_each_others_keys(all_three: Keyholder) -> None:
    def create(number: int) -> Header:
        return all_three.create(Provider.KEYFILE, bytes([number]) * 16, epoch=1)[0]

    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(create, range(40)))
    assert len({all_three.fetch(header) for header in headers}) == 40
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(all_three.drop, headers[1:]))
    assert all_three.fetch(headers[0])
    with pytest.raises(KeyMissing):
        all_three.fetch(headers[1])


def test_what_a_rotation_left_is_dropped_and_other_vaults_keys_stay(all_three: Keyholder) -> None:
    old, new = (all_three.create(Provider.KEYFILE, VAULT, epoch=epoch)[0] for epoch in (1, 2))
    other, _ = all_three.create(Provider.KEYFILE, bytes(16), epoch=1)
    all_three.drop_others(new)
    assert all_three.fetch(new)
    assert all_three.fetch(other)
    with pytest.raises(KeyMissing):
        all_three.fetch(old)
