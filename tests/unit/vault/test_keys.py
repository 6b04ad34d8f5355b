"""A key is where its provider keeps it, and each way to lose it has a name of its own."""

import hashlib
import json
import subprocess
import sys
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
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.keys import Header, Keyholder, Provider, system_keys

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


@pytest.mark.parametrize("weak", [
    "x", "seven77", "aaaaaaaaaaaa", "abcabcabcabc", "passpass", "12345678", "87654321",
    "abcdefghij",
])
def test_a_passphrase_that_is_easy_to_guess_is_refused_with_what_to_choose(
    all_three: Keyholder, weak: str
) -> None:
    with pytest.raises(SettingError, match="8 characters") as caught:
        replace(all_three, passphrase=lambda: weak).create(Provider.PASSPHRASE, VAULT, epoch=1)
    assert weak not in str(caught.value)


def test_a_passphrase_does_not_take_its_own_place(all_three: Keyholder) -> None:
    header, _ = all_three.create(Provider.PASSPHRASE, VAULT, epoch=1)
    with pytest.raises(SettingError, match="old one"):
        all_three.create(Provider.PASSPHRASE, VAULT, epoch=2, replaces=header)
    other, _ = replace(all_three, passphrase=lambda: "another horse").create(
        Provider.PASSPHRASE, VAULT, epoch=2, replaces=header)
    file, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=3, replaces=other)
    all_three.create(Provider.PASSPHRASE, VAULT, epoch=4, replaces=file)


def test_the_provider_that_is_expected_is_the_only_one(all_three: Keyholder) -> None:
    """A vault of another may have been put in the place of the user's."""
    expecting = replace(all_three, expected=Provider.PASSPHRASE)
    assert expecting.choose() is Provider.PASSPHRASE
    for provider in (Provider.KEYRING, Provider.KEYFILE):
        header, _ = all_three.create(provider, VAULT, epoch=1)
        with pytest.raises(VaultUnsafe, match=f"set CLOISTER_PROVIDER={provider}"):
            expecting.fetch(header)
        assert replace(all_three, expected=provider).fetch(header)


@pytest.mark.parametrize(("variables", "provider"), [
    ({}, Provider.KEYRING), ({"passphrase": "correct horse"}, Provider.PASSPHRASE),
    ({"passphrase": "correct horse", "provider": "keyfile"}, Provider.KEYFILE),
    ({"provider": "keyfile"}, Provider.KEYFILE),
])
def test_what_the_settings_name_wins_over_a_key_store(
    tmp_path: Path, keys, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str],
    provider: Provider,
) -> None:
    monkeypatch.setattr(local, "system_keys", lambda: (keys, ""))
    settings = Settings(home=tmp_path, data=None, **variables)
    assert local.keyholder(settings, ask=str).choose() is provider
    with pytest.raises(SettingError, match="keyring, passphrase, keyfile"):
        local.keyholder(Settings(home=tmp_path, data=None, provider="cloud"))


@pytest.mark.parametrize("backend", [
    "keyrings.alt.file.PlaintextKeyring", "no.such.Keyring", "nonsense", "keyring.backends.fail.X",
])
def test_a_key_store_that_cannot_be_loaded_is_none_and_a_key_file_still_works(
    tmp_path: Path, backend: str
) -> None:
    program = (
        "from cloister.vault.keys import *; from cloister.errors import SettingError\n"
        "keys, reason = system_keys()\n"
        "from pathlib import Path; import sys\n"
        "holder = Keyholder(keyfile=Path(sys.argv[1]), keys=keys, no_keys=reason)\n"
        "header, key = holder.create(holder.choose(), bytes(16), epoch=1)\n"
        "assert holder.fetch(header) == key and keys is None\n"
        "print(holder.notice(header.provider))\n"
        "try: holder.create(Provider.KEYRING, bytes(16), epoch=1)\n"
        "except SettingError as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "k")], capture_output=True, text=True,
        check=True, env={"PYTHONPATH": ":".join(sys.path), "PYTHON_KEYRING_BACKEND": backend},
    ).stdout
    assert said.count("cannot be loaded") == 2, said
    assert "choose the provider passphrase or keyfile" in said


def test_an_old_key_is_overwritten_unless_a_backup_shares_its_file(all_three: Keyholder) -> None:
    header, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    with all_three.keyfile.open("rb") as old:
        all_three.create(Provider.KEYFILE, bytes(16), epoch=1)
        assert not any(old.read())
    before = all_three.keyfile.read_bytes()
    backup = all_three.keyfile.with_name("backup")
    backup.hardlink_to(all_three.keyfile)
    all_three.drop(header)
    assert backup.read_bytes() == before != all_three.keyfile.read_bytes()


def test_a_key_that_a_killed_process_left_beside_the_key_file_is_removed(
    all_three: Keyholder,
) -> None:
    header, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    left = all_three.keyfile.with_name(".vault.key.a1b2c3d4")
    left.write_bytes(all_three.keyfile.read_bytes())
    all_three.drop(header)
    assert not left.exists()


def sealed(text: bytes) -> bytes:
    return text + hashlib.sha256(text).digest()


@pytest.mark.parametrize("change", [
    {"parameters": []}, {"parameters": {"salt": []}}, {"epoch": "x"}, {"provider": "\x1b[2J"},
    {"format": "\x1b]52;c;ZXZpbA==\x07"}, {"format": None}, {"vault": 7}, {"vault": "zz"},
    {"key_id": ["00"]}, {"more": 1},
])
def test_a_header_of_other_types_is_damage_and_shows_nothing_of_itself(
    all_three: Keyholder, change: dict
) -> None:
    header, _ = all_three.create(Provider.KEYFILE, VAULT, epoch=1)
    text = json.dumps({**json.loads(header.encode()[:-32]), **change}).encode()
    with pytest.raises(KeyDamaged) as caught:
        Header.decode(sealed(text))
    assert "\x1b" not in str(caught.value)
    for nested in (b"[" * 100_000, b'{"format":1,"more":' + b"[" * 100_000):
        with pytest.raises(KeyDamaged):
            Header.decode(sealed(nested))


def test_no_test_reaches_the_key_store_or_settings_of_whoever_runs_it() -> None:
    program = (
        "import os, keyring; from cloister.vault.keys import system_keys\n"
        "assert system_keys()[0] is None\n"
        "print(type(keyring.get_keyring()).__module__, sorted(\n"
        "    name for name in os.environ if name.startswith('CLOISTER_') or 'DBUS' in name))"
    )
    assert system_keys()[0] is None
    for env, names in ((None, "'CLOISTER_HOME'"), ({"PYTHONPATH": ":".join(sys.path)}, "[]")):
        said = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True,
        ).stdout
        assert said.startswith("keyring.backends.null ")
        assert names in said
        assert "PASSPHRASE" not in said and "DBUS" not in said
