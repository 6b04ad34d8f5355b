"""What was done to the vault with intent or by accident, and is not possible now."""

import errno
import os
import re
from pathlib import Path

import pytest
from tests.unit.vault.test_store import SECRET, again, edit, files

from cloister.errors import KeyDamaged, VaultDamaged, VaultError, VaultUnsafe
from cloister.vault import hygiene, store
from cloister.vault.keys import Keyholder
from cloister.vault.namespace import Kind
from cloister.vault.retention import Retention
from cloister.vault.store import Vault


def test_an_opening_beside_a_rotation_does_not_lose_the_new_key(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process rotates and closes after the header was read, and before the lock."""
    vault.namespace().put(Kind.HISTORY, b"diary", b"my only copy")
    directory, holder = vault.directory, vault.keys.keyholder
    vault.close()
    take_lock = store._opened

    def late(path: Path) -> int:
        monkeypatch.setattr(store, "_opened", take_lock)
        with Vault(directory, holder) as other:
            other.rotate()
        return take_lock(path)

    monkeypatch.setattr(store, "_opened", late)
    with Vault(directory, holder) as vault:
        assert vault.header.epoch == 2
    with Vault(directory, holder) as vault:
        assert vault.namespace().get(Kind.HISTORY, b"diary") == b"my only copy"


@pytest.mark.parametrize("statement", [
    "CREATE TRIGGER t BEFORE DELETE ON objects BEGIN UPDATE objects SET used = 0; END",
    "CREATE VIEW v AS SELECT * FROM records", "CREATE TABLE shadow (wrapped BLOB)",
    "CREATE INDEX i ON records (sealed)", "ALTER TABLE records ADD COLUMN more",
    "ALTER TABLE records RENAME COLUMN sealed TO content",
])
def test_a_schema_of_somebody_elses_is_refused(vault: Vault, statement: str) -> None:
    vault.namespace().append(Kind.HISTORY, b"talk", [b"1"])
    edit(vault, statement)
    with pytest.raises(VaultDamaged, match="tables"):
        Vault(vault.directory, vault.keys.keyholder)


def test_a_view_that_never_ends_is_not_read(vault: Vault) -> None:
    edit(vault, "ALTER TABLE namespaces RENAME TO n0",
         "CREATE VIEW namespaces AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) "
         "SELECT tag, sealed FROM n0, c")
    with pytest.raises(VaultDamaged, match="tables"):
        Vault(vault.directory, vault.keys.keyholder)


@pytest.mark.parametrize("column", [
    "records SET number = x'0000000000000001' WHERE number = 1",
    "records SET version = x'0000000000000001'", "keys SET epoch = x'0000000000000001'",
    "objects SET kind = x'0000000000000003' WHERE kind = 3",
    "objects SET file = CAST(file AS BLOB) WHERE file NOT NULL",
    "namespaces SET tag = CAST(tag AS TEXT)",
])
def test_a_number_stored_as_its_bytes_is_refused(vault: Vault, column: str) -> None:
    """It has the same leaf, opens with the same context, and sorts after all others."""
    space = vault.namespace()
    space.append(Kind.HISTORY, b"talk", [b"no, never", b"yes, at once"])
    space.put(Kind.RESPONSES, b"a", b"1")
    space.put_large(Kind.PREFIX, b"kv", [b"2"])
    edit(vault, f"UPDATE OR REPLACE {column}")
    with pytest.raises((VaultDamaged, KeyDamaged)):
        Vault(vault.directory, vault.keys.keyholder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["segment", "vault.key", "vault.key.lock", "lock", "vault.db"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(
    vault: Vault, name: str
) -> None:
    vault.namespace().put_large(Kind.PREFIX, b"kv", [b"state"])
    vault.close()
    path = {
        "segment": next((vault.directory / "segments").iterdir()), "lock": vault.directory / "lock",
        "vault.db": vault.directory / "vault.db",
    }.get(name, vault.directory.with_name(name))
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    with pytest.raises(VaultError), Vault(vault.directory, vault.keys.keyholder) as opened:
        opened.namespace().get_large(Kind.PREFIX, b"kv")
        opened.rotate()


def test_history_is_shredded_with_the_kv_state_that_inverts_to_it(vault: Vault) -> None:
    space = vault.namespace()
    space.append(Kind.HISTORY, b"talk", [SECRET])
    space.put_large(Kind.PREFIX, b"kv", [SECRET])
    space.put(Kind.RESPONSES, b"a", b"1")
    assert space.shred(Kind.HISTORY) == 2
    assert set(space.sizes()) == {Kind.RESPONSES}
    assert not list((vault.directory / "segments").iterdir())
    with again(vault) as vault:
        assert list(vault.namespace().everything()) == [b"1"]


def test_what_belongs_to_a_forgotten_object_is_not_written_any_more(vault: Vault) -> None:
    """Also where one of the same name was made since."""
    space = vault.namespace()
    owner = space.append(Kind.HISTORY, b"talk", [b"kv"])
    assert owner is not None and owner == space.identity(Kind.HISTORY, b"talk")
    assert space.put_large(Kind.PREFIX, b"kv", [SECRET], owner=owner)
    assert space.forget(Kind.HISTORY, b"talk", also=lambda records: [
        (Kind.PREFIX, record) for record in records])
    for _ in range(2):
        assert not space.put_large(Kind.PREFIX, b"kv", [SECRET], owner=owner)
        assert not space.has(Kind.PREFIX, b"kv")
        assert not list((vault.directory / "segments").iterdir())
        space.append(Kind.HISTORY, b"talk", [b"begun anew"])
    vault.rotate()
    assert space.put_large(
        Kind.PREFIX, b"kv", [SECRET], owner=space.append(Kind.HISTORY, b"talk", [b"kv"]))


def test_what_is_trimmed_is_not_left_in_the_database_file(vault: Vault) -> None:
    space = vault.namespace()
    for number in range(20):
        space.put(Kind.RESPONSES, b"%d" % number, b"x")
    wrapped = [row[0] for row in vault.db.rows("SELECT wrapped FROM objects")]
    vault.db.truncate()
    assert all(key in files(vault.directory) for key in wrapped)
    assert space.trim(Kind.RESPONSES, Retention(most_bytes=0)) == 20
    assert not any(key in files(vault.directory) for key in wrapped)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_home_that_others_can_write_to_is_closed_at_first_and_refused_later(
    tmp_path: Path, mode: int
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(mode)
    holder = Keyholder(keyfile=home / "key")
    with Vault.create(home / "vault", holder) as vault:
        assert "Others could write" in vault.notice
    assert home.stat().st_mode & 0o777 == mode & ~0o022
    home.chmod(mode)
    with pytest.raises(VaultUnsafe, match="chmod go-w"):
        Vault(home / "vault", holder)
    home.chmod(0o1777)  # as /tmp is: nobody moves what is ours
    Vault(home / "vault", holder).close()


def test_every_key_in_memory_is_locked_and_counted(vault: Vault) -> None:
    for number in range(40):
        vault.namespace(f"n{number}").put(Kind.RESPONSES, b"a", b"x")
    with again(vault) as vault:
        assert vault.keys.locked()["mlock"] == "done (3 keys)"
        for number in range(40):
            vault.namespace(f"n{number}").get(Kind.RESPONSES, b"a")
        assert vault.keys.locked() == {
            "mlock": "done (43 keys)", "MADV_DONTDUMP": "done (43 keys)"}
        keys, flags = vault.keys.secrets(), {}
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
            elif line.startswith("VmFlags:"):
                flags.update({key: line.split() for key in keys if start <= id(key) < end})
        assert len(keys) == len(flags) == 43
        assert all({"lo", "dd"} <= set(found) for found in flags.values())


def test_memory_that_could_not_be_locked_is_said(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = hygiene.ctypes.CDLL

    class Refusing:
        def __init__(self, *given: object, **options: object) -> None:
            self.libc = libc(*given, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(self.libc, name)

        def mlock(self, *_: object) -> int:
            hygiene.ctypes.set_errno(errno.ENOMEM)
            return -1

    monkeypatch.setattr(hygiene.ctypes, "CDLL", Refusing)
    with again(vault) as vault:
        assert vault.keys.locked() == {
            "mlock": "failed: Cannot allocate memory (3 keys)", "MADV_DONTDUMP": "done (3 keys)"}


def test_a_vault_says_when_it_is_made_and_only_then_who_holds_its_key(
    tmp_path: Path, keys
) -> None:
    for number, (holder, words) in enumerate((
        (Keyholder(keyfile=tmp_path / "k"), ("keyfile", "copies the key file too", "no key store")),
        (Keyholder(keyfile=tmp_path / "k", keys=keys), ("keyring", "programs of this user")),
        (Keyholder(keyfile=tmp_path / "k", passphrase=lambda: "correct horse"),
         ("passphrase", "guess")),
    )):
        with Vault.create(tmp_path / f"vault{number}", holder) as made:
            assert all(word in made.notice for word in words), made.notice
        with Vault(made.directory, holder) as opened:
            assert opened.notice == ""
