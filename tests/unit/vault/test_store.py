"""What is kept comes back, and only that: not after damage, not elsewhere, not after forgetting."""

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.errors import (
    CloisterError,
    KeyDamaged,
    KeyMissing,
    NotEnoughDisk,
    OutputExists,
    SettingError,
    VaultDamaged,
    VaultError,
    VaultRolledBack,
    VaultUnsafe,
    VaultVersionError,
)
from cloister.vault import database, segments
from cloister.vault import namespace as namespaces
from cloister.vault.keys import Keyholder, Provider
from cloister.vault.namespace import Kind
from cloister.vault.retention import Retention
from cloister.vault.store import Vault

SECRET = b"the quick brown fox of the canary"


def again(vault: Vault) -> Vault:
    """The same, opened anew."""
    vault.close()
    return Vault(vault.directory, vault.keys.keyholder)


def edit(vault: Vault, *statements: str) -> None:
    """Change the database behind the closed vault's back."""
    vault.close()
    db = sqlite3.connect(vault.directory / "vault.db")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def files(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_what_is_kept_comes_back_after_reopening(vault: Vault) -> None:
    space = vault.namespace("work")
    space.put(Kind.RESPONSES, b"a", b"one")
    space.put(Kind.RESPONSES, b"a", b"two")
    space.append(Kind.HISTORY, b"talk", [b"1", b""])
    space.append(Kind.HISTORY, b"talk", [SECRET])
    space.put_large(Kind.PREFIX, b"kv", [b"x" * 70_000, memoryview(b"yz")], bound=b"model")
    with again(vault) as vault:
        space = vault.namespace("work")
        assert space.get(Kind.RESPONSES, b"a") == b"two"
        assert space.records(Kind.HISTORY, b"talk") == [b"1", b"", SECRET]
        assert space.get_large(Kind.PREFIX, b"kv", bound=b"model") == b"x" * 70_000 + b"yz"
        assert [each.name for each in vault.namespaces()] == ["work"]
        assert space.get(Kind.RESPONSES, b"b") is None
        assert space.get_large(Kind.PREFIX, b"b") is None
        assert space.records(Kind.HISTORY, b"b") == []
        assert not vault.namespace("other").has(Kind.RESPONSES, b"a")
        assert space.has(Kind.RESPONSES, b"a")
        assert not space.has(Kind.HISTORY, b"a")


def test_nothing_of_it_lies_open_on_the_disk(vault: Vault) -> None:
    space = vault.namespace("namesake")
    space.append(Kind.HISTORY, b"conversation name", [SECRET])
    space.put_large(Kind.PREFIX, SECRET, [SECRET * 1000])
    space.put(Kind.RESPONSES, SECRET, SECRET)
    for moment in ("open", "closed"):
        held = files(vault.directory)
        for text in (SECRET, b"conversation name", b"namesake"):
            assert text not in held, moment
        vault.close()


def test_state_of_another_model_does_not_open(vault: Vault) -> None:
    space = vault.namespace()
    space.put_large(Kind.PREFIX, b"kv", [b"state"], bound=b"one model")
    with pytest.raises(VaultDamaged):
        space.get_large(Kind.PREFIX, b"kv", bound=b"another")


@pytest.mark.parametrize("name", ["", "A", "a" * 65, "a/b", "..\n", "\u00e9", "x" * 10_000, "a b"])
def test_a_namespace_of_another_form_is_refused_without_its_name(vault: Vault, name: str) -> None:
    with pytest.raises(SettingError, match="1 to 64") as caught:
        vault.namespace(name)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("statement", "error"), [
    ("DELETE FROM records WHERE number = 1", VaultDamaged),
    ("DELETE FROM objects WHERE kind = 3", VaultDamaged),
    ("DELETE FROM namespaces", VaultDamaged),
    ("UPDATE records SET version = version + 1", VaultDamaged),
    ("UPDATE records SET number = 5 WHERE number = 1", VaultDamaged),
    ("UPDATE objects SET kind = 4 WHERE kind = 3", VaultDamaged),
    ("UPDATE objects SET size = size + 1", VaultDamaged),
    ("UPDATE keys SET wrapped = randomblob(40) WHERE namespace = x'726f6f74'", KeyDamaged),
    ("UPDATE keys SET wrapped = randomblob(40) WHERE kind = 1", VaultDamaged),
    ("DELETE FROM keys WHERE kind = 0", KeyDamaged),
    ("UPDATE meta SET value = x'00' WHERE name = 'header'", KeyDamaged),
    ("DELETE FROM meta WHERE name = 'header'", KeyDamaged),
    ("UPDATE meta SET value = x'00' WHERE name = 'state'", VaultDamaged),
    ("DELETE FROM meta WHERE name = 'state'", VaultDamaged),
    ("DROP TABLE records", VaultDamaged),
    ("PRAGMA user_version = 2", VaultVersionError),
    ("PRAGMA user_version = 0", VaultVersionError),
    ("INSERT INTO records SELECT object, number + 7, version, sealed FROM records", VaultDamaged),
])
def test_rows_that_were_changed_behind_its_back_are_refused_at_opening(
    vault: Vault, statement: str, error: type[CloisterError]
) -> None:
    space = vault.namespace()
    space.append(Kind.HISTORY, b"talk", [b"1", b"2", b"3"])
    space.put(Kind.RESPONSES, b"a", b"one")
    edit(vault, statement)
    with pytest.raises(error):
        Vault(vault.directory, vault.keys.keyholder)


def test_a_record_put_back_as_it_was_earlier_is_refused(vault: Vault) -> None:
    space = vault.namespace()
    space.put(Kind.RESPONSES, b"a", b"old")
    old = vault.db.rows("SELECT version, sealed FROM records")[0]
    space.put(Kind.RESPONSES, b"a", b"new")
    vault.db.rows("UPDATE records SET version = ?, sealed = ?", *old)
    with pytest.raises(VaultDamaged):
        again(vault)


def test_a_sealed_record_opens_in_no_other_place(vault: Vault) -> None:
    """Rows are swapped while the vault is open, so that only the seals are left to notice."""
    one, other = vault.namespace("one"), vault.namespace("other")
    one.append(Kind.HISTORY, b"a", [b"1", b"2"])
    one.append(Kind.HISTORY, b"b", [b"3"])
    other.append(Kind.HISTORY, b"a", [b"4"])
    rows = vault.db.rows("SELECT object, number, sealed FROM records")
    for object_, number, mine in rows:
        for _, _, foreign in rows:
            vault.db.rows("UPDATE records SET sealed = ? WHERE object = ? AND number = ?",
                          foreign, object_, number)
            held = [one.records(Kind.HISTORY, b"a"), one.records(Kind.HISTORY, b"b"),
                    other.records(Kind.HISTORY, b"a")] if foreign == mine else None
            if held is None:
                with pytest.raises(VaultDamaged):
                    for space, name in ((one, b"a"), (one, b"b"), (other, b"a")):
                        space.records(Kind.HISTORY, name)
            else:
                assert held == [[b"1", b"2"], [b"3"], [b"4"]]
        vault.db.rows("UPDATE records SET sealed = ? WHERE object = ? AND number = ?",
                      mine, object_, number)


def test_a_key_pasted_from_another_object_does_not_open_it(vault: Vault) -> None:
    space = vault.namespace()
    space.put(Kind.RESPONSES, b"a", b"1")
    space.put(Kind.RESPONSES, b"b", b"2")
    (_, wrapped), (other, _) = vault.db.rows("SELECT tag, wrapped FROM objects")
    vault.db.rows("UPDATE objects SET wrapped = ? WHERE tag = ?", wrapped, other)
    with pytest.raises(KeyDamaged):
        for name in (b"a", b"b"):
            space.get(Kind.RESPONSES, name)


def change_segment(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flip":
        path.write_bytes(data[:30_000] + bytes([data[30_000] ^ 1]) + data[30_001:])
    elif how == "truncate":
        path.write_bytes(data[:-1])
    elif how == "extend":
        path.write_bytes(data + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "delete":
        path.unlink()
    elif how == "link":
        moved = path.rename(path.with_name("elsewhere"))
        path.symlink_to(moved)


@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "empty", "delete", "link", "swap"])
def test_a_segment_that_was_changed_is_refused_and_the_rest_still_opens(
    vault: Vault, how: str
) -> None:
    space = vault.namespace()
    space.put_large(Kind.PREFIX, b"a", [b"x" * 50_000])
    space.put_large(Kind.PREFIX, b"b", [b"y" * 50_000])
    space.put(Kind.RESPONSES, b"c", b"kept")
    names = [row[0] for row in vault.db.rows("SELECT file FROM objects WHERE file NOT NULL")]
    one, other = (vault.directory / "segments" / name for name in names)
    if how == "swap":
        shutil.copy(one, other)
    else:
        change_segment(other, how)
    found = 0
    for name in (b"a", b"b"):
        try:
            found += len(space.get_large(Kind.PREFIX, name) or b"")
        except VaultDamaged:
            continue
    assert found == 50_000
    assert space.get(Kind.RESPONSES, b"c") == b"kept"


@pytest.mark.parametrize("name", ["vault.db", "vault.db-wal", "segments"])
def test_a_file_that_others_can_read_is_refused_with_what_to_run(vault: Vault, name: str) -> None:
    vault.namespace().put(Kind.RESPONSES, b"a", b"1")
    path = vault.directory / name
    path.chmod(0o755 if path.is_dir() else 0o640)
    with pytest.raises(VaultUnsafe, match="chmod"):
        Vault(vault.directory, vault.keys.keyholder)
    vault.directory.chmod(0o755)
    with pytest.raises(VaultUnsafe, match="chmod 700"):
        Vault(vault.directory, vault.keys.keyholder)


@pytest.mark.parametrize(("magic", "name"), [(0x6969, "NFS"), (0xFF534D42, "CIFS")])
def test_a_network_file_system_is_refused_by_name(
    tmp_path: Path, keyholder: Keyholder, magic: int, name: str
) -> None:
    with pytest.raises(VaultUnsafe, match=name):
        Vault.create(tmp_path / "vault", keyholder, system=lambda _: magic)
    assert not list(tmp_path.glob("vault*"))
    assert not keyholder.keyfile.exists()


@pytest.mark.parametrize("content", [b"", b"no database " * 500])
def test_a_database_that_is_none_is_refused_and_left_alone(vault: Vault, content: bytes) -> None:
    vault.close()
    path = vault.directory / "vault.db"
    path.write_bytes(content)
    with pytest.raises((VaultDamaged, VaultVersionError)):
        Vault(vault.directory, vault.keys.keyholder)
    assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(VaultDamaged, match="--beside"):
        Vault(vault.directory, vault.keys.keyholder)
    assert not path.exists()


def test_a_vault_that_was_closed_is_not_called_damaged(vault: Vault) -> None:
    space = vault.namespace()
    vault.close()
    with pytest.raises(VaultError, match="was closed") as caught:
        space.get(Kind.RESPONSES, b"a")
    assert not isinstance(caught.value, VaultDamaged)


def test_a_lost_key_leaves_the_vault_as_it_is(vault: Vault, keyholder: Keyholder) -> None:
    vault.namespace().put(Kind.RESPONSES, b"a", b"1")
    vault.close()
    held = files(vault.directory)
    key = keyholder.keyfile.read_bytes()
    keyholder.keyfile.unlink()
    with pytest.raises(KeyMissing):
        Vault(vault.directory, keyholder)
    assert files(vault.directory) == held
    keyholder.keyfile.write_bytes(key)
    keyholder.keyfile.chmod(0o600)
    with Vault(vault.directory, keyholder) as vault:
        assert vault.namespace().get(Kind.RESPONSES, b"a") == b"1"


def test_nothing_is_made_where_something_is(tmp_path: Path, vault: Vault) -> None:
    for taken in (vault.directory, tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(OutputExists):
            Vault.create(taken, vault.keys.keyholder)
    with pytest.raises(VaultError, match="init"):
        Vault(tmp_path / "none", vault.keys.keyholder)


@pytest.mark.parametrize("provider", [Provider.KEYFILE, Provider.KEYRING, Provider.PASSPHRASE])
def test_rotation_takes_a_new_key_and_rewrites_no_content(
    vault: Vault, keys, provider: Provider
) -> None:
    vault.keys.keyholder = replace(
        vault.keys.keyholder, keys=keys, passphrase=lambda: "correct horse")
    space = vault.namespace()
    space.put(Kind.RESPONSES, b"a", b"old")
    space.put_large(Kind.PREFIX, b"kv", [b"state"])
    sealed = vault.db.rows("SELECT sealed FROM records")
    segment = next((vault.directory / "segments").iterdir()).read_bytes()
    old = vault.header
    new = vault.rotate(provider)
    assert (new.provider, new.epoch) == (provider, 2)
    assert vault.db.rows("SELECT sealed FROM records") == sealed
    assert next((vault.directory / "segments").iterdir()).read_bytes() == segment
    space.put(Kind.RESPONSES, b"b", b"new")
    epochs = vault.db.rows("SELECT epoch FROM objects ORDER BY epoch")
    assert epochs == [(1,), (1,), (2,)]
    with again(vault) as vault:
        assert vault.header == new
        space = vault.namespace()
        assert space.get(Kind.RESPONSES, b"a") == b"old"
        assert space.get(Kind.RESPONSES, b"b") == b"new"
        assert space.get_large(Kind.PREFIX, b"kv") == b"state"
        with pytest.raises(KeyMissing):
            vault.keys.keyholder.fetch(old)


def test_a_rotation_that_fails_changes_nothing(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.namespace().put(Kind.RESPONSES, b"a", b"1")
    old, key = vault.header, vault.keys.keyholder.keyfile.read_bytes()
    monkeypatch.setattr(vault.keys, "rewrapped", None)
    with pytest.raises(TypeError):
        vault.rotate()
    assert (vault.header, vault.keys.keyholder.keyfile.read_bytes()) == (old, key)
    with again(vault) as vault:
        assert vault.namespace().get(Kind.RESPONSES, b"a") == b"1"


def test_two_that_have_it_open_see_each_others_writes_and_rotations(vault: Vault) -> None:
    with Vault(vault.directory, vault.keys.keyholder) as other:
        vault.namespace().put(Kind.RESPONSES, b"a", b"1")
        assert other.namespace().get(Kind.RESPONSES, b"a") == b"1"
        vault.rotate()
        other.namespace().put(Kind.RESPONSES, b"b", b"2")
        assert vault.namespace().get(Kind.RESPONSES, b"b") == b"2"
        other.namespace().shred()
        vault.namespace().put(Kind.RESPONSES, b"a", b"3")
        vault.namespace().put_large(Kind.PREFIX, b"kv", [b"state"])
        assert other.namespace().get(Kind.RESPONSES, b"a") == b"3"
        assert other.namespace().get_large(Kind.PREFIX, b"kv") == b"state"
        assert not vault.namespace().has(Kind.RESPONSES, b"b")
    with again(vault) as vault:
        assert vault.namespace().get(Kind.RESPONSES, b"a") == b"3"


def test_what_is_forgotten_is_gone_and_so_is_its_key(vault: Vault) -> None:
    space, other = vault.namespace(), vault.namespace("other")
    space.append(Kind.HISTORY, b"talk", [b"1", b"2"])
    space.put_large(Kind.PREFIX, b"kv", [b"state"])
    other.append(Kind.HISTORY, b"talk", [b"3"])
    wrapped = [row[0] for row in vault.db.rows(
        "SELECT wrapped FROM objects WHERE namespace = ?", space.tag)]
    assert all(key in files(vault.directory) for key in wrapped)
    assert space.forget(Kind.HISTORY, b"talk")
    assert space.forget(Kind.PREFIX, b"kv")
    assert not space.forget(Kind.HISTORY, b"talk")
    assert not any(key in files(vault.directory) for key in wrapped)
    assert not list((vault.directory / "segments").iterdir())
    assert space.records(Kind.HISTORY, b"talk") == []
    with again(vault) as vault:
        assert vault.namespace("other").records(Kind.HISTORY, b"talk") == [b"3"]


@pytest.mark.parametrize("kind", [None, Kind.RESPONSES])
def test_shredding_takes_a_namespace_or_one_kind_of_it(vault: Vault, kind: Kind | None) -> None:
    space, other = vault.namespace(), vault.namespace("other")
    for each in (space, other):
        each.append(Kind.HISTORY, b"talk", [b"1"])
        each.put(Kind.RESPONSES, b"a", b"2")
    keys = [row[0] for row in vault.db.rows(
        "SELECT wrapped FROM keys WHERE namespace = ? AND kind = 3", space.tag)]
    assert space.shred(kind) == (2 if kind is None else 1)
    assert not any(key in files(vault.directory) for key in keys)
    assert space.records(Kind.HISTORY, b"talk") == ([] if kind is None else [b"1"])
    assert space.get(Kind.RESPONSES, b"a") is None
    with again(vault) as vault:
        assert vault.namespace("other").get(Kind.RESPONSES, b"a") == b"2"
        names = [each.name for each in vault.namespaces()]
        assert names == (["other"] if kind is None else ["default", "other"])
        vault.namespace().put(Kind.RESPONSES, b"a", b"anew")
    with again(vault) as vault:
        assert vault.namespace().get(Kind.RESPONSES, b"a") == b"anew"


def test_retention_deletes_what_is_old_and_then_what_was_used_least(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = vault.namespace()
    hour = int(time.time()) // 3600
    for number, age in enumerate((30, 5, 5, 5)):
        monkeypatch.setattr(namespaces, "_hour", lambda age=age: hour - age)
        space.put(Kind.RESPONSES, b"%d" % number, b"x" * 200)
    monkeypatch.setattr(namespaces, "_hour", lambda: hour)
    assert space.trim(Kind.RESPONSES, Retention(hours=24)) == 1
    assert not space.has(Kind.RESPONSES, b"0")
    space.get(Kind.RESPONSES, b"1")  # used again
    space.put(Kind.RESPONSES, b"9", b"y" * 200)
    assert space.trim(Kind.RESPONSES, Retention(most_bytes=3 * 328)) == 1
    assert [space.has(Kind.RESPONSES, name) for name in (b"1", b"2", b"3", b"9")] == [
        True, False, True, True]
    monkeypatch.setattr(namespaces, "_hour", lambda: hour - 1000)  # the clock goes backwards
    assert space.trim(Kind.RESPONSES, Retention(hours=24)) == 0
    space.put(Kind.RESPONSES, b"8", b"z")
    assert space.get(Kind.RESPONSES, b"8") == b"z"
    with again(vault) as vault:
        assert vault.namespace().sizes()[Kind.RESPONSES] == (4, 4 * 328)


@pytest.mark.parametrize("bounds", [{"hours": -1}, {"most_bytes": -1}])
def test_a_retention_below_nothing_is_refused_by_name(bounds: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(bounds))):
        Retention(**bounds)


def test_a_whole_directory_put_back_is_seen_where_a_key_store_remembers(
    tmp_path: Path, keys
) -> None:
    holder = Keyholder(keyfile=tmp_path / "k", keys=keys)
    with Vault.create(tmp_path / "vault", holder) as vault:
        vault.namespace().put(Kind.RESPONSES, b"a", b"1")
    shutil.copytree(vault.directory, tmp_path / "copy")
    with Vault(vault.directory, holder) as vault:
        vault.namespace().put(Kind.RESPONSES, b"a", b"2")
    shutil.rmtree(vault.directory)
    shutil.move(tmp_path / "copy", vault.directory)
    with pytest.raises(VaultRolledBack):
        Vault(vault.directory, holder)
    with Vault(vault.directory, holder, accept_rollback=True) as vault:
        assert vault.namespace().get(Kind.RESPONSES, b"a") == b"1"
    with Vault(vault.directory, holder) as vault:  # once is enough
        assert vault.namespace().get(Kind.RESPONSES, b"a") == b"1"


def test_a_directory_from_before_the_key_store_is_refused_where_it_remembers(
    vault: Vault, keys
) -> None:
    holder, key = replace(vault.keys.keyholder, keys=keys), vault.keys.keyholder.keyfile
    vault.close()
    copy, old_key = vault.directory.with_name("copy"), key.read_bytes()
    shutil.copytree(vault.directory, copy)
    with Vault(vault.directory, holder) as vault:
        vault.rotate(Provider.KEYRING)
    shutil.rmtree(vault.directory)
    copy.rename(vault.directory)
    key.write_bytes(old_key)
    with pytest.raises(VaultRolledBack):
        Vault(vault.directory, holder)


def test_nothing_is_noted_outside_before_it_is_on_the_disk(
    vault: Vault, keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut looks like a rollback, and the user is locked out."""
    vault.keys.keyholder = replace(vault.keys.keyholder, keys=keys)
    vault.rotate(Provider.KEYRING)
    vault.namespace().put(Kind.RESPONSES, b"a", b"1")  # a cache's write is not synced
    happened = []
    note, begin = Keyholder.set_anchor, vault.db.transaction
    monkeypatch.setattr(Keyholder, "set_anchor", lambda *given: (
        happened.append("noted"), note(*given)))
    monkeypatch.setattr(vault.db, "transaction", lambda durable: (
        happened.append(durable), begin(durable=durable))[1])
    vault.close()
    assert happened == [True, "noted"]
    with Vault(vault.directory, vault.keys.keyholder) as vault:
        happened.clear()
    assert happened == ["noted"]  # what did not change is not written


def test_what_another_process_keeps_in_the_log_is_told(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.namespace().put(Kind.RESPONSES, b"a", SECRET)
    monkeypatch.setattr(database, "WAIT_S", 0.1)
    with again(vault) as vault, Vault(vault.directory, vault.keys.keyholder) as other:
        vault.namespace().put(Kind.RESPONSES, b"b", SECRET)
        with other.db.transaction(write=False):
            assert other.namespace().has(Kind.RESPONSES, b"a")
            with pytest.raises(VaultError, match="log"):
                vault.namespace().forget(Kind.RESPONSES, b"a")
        assert not other.namespace().has(Kind.RESPONSES, b"a")


def test_records_are_appended_only_to_those_that_were_known(vault: Vault) -> None:
    space = vault.namespace()
    assert space.append(Kind.HISTORY, b"talk", [b"1", b"2"], after=0)
    assert not space.append(Kind.HISTORY, b"talk", [b"3"], after=0)
    assert not space.append(Kind.HISTORY, b"talk", [b"3"], after=3)
    assert space.append(Kind.HISTORY, b"talk", [b"3"], after=2)
    assert space.records(Kind.HISTORY, b"talk") == [b"1", b"2", b"3"]


def test_an_interrupt_after_the_commit_does_not_take_the_file_away(vault: Vault) -> None:
    class Late(set):
        def clear(self) -> None:
            raise KeyboardInterrupt

    space, vault.used = vault.namespace(), Late()
    with pytest.raises(KeyboardInterrupt):
        space.put_large(Kind.PREFIX, b"kv", [SECRET])
    vault.used = set()
    assert space.get_large(Kind.PREFIX, b"kv") == SECRET


def test_what_is_shredded_while_it_is_read_is_not_there(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = vault.namespace()
    space.put(Kind.RESPONSES, b"a", b"1")
    space.put_large(Kind.PREFIX, b"kv", [b"2"])
    with Vault(vault.directory, vault.keys.keyholder) as other:
        reading = other.keys.object_wrapping

        def shredded(*given: object) -> bytes:
            space.shred()
            return reading(*given)

        monkeypatch.setattr(other.keys, "object_wrapping", shredded)
        assert other.namespace().get(Kind.RESPONSES, b"a") is None
        assert other.namespace().get_large(Kind.PREFIX, b"kv") is None


def test_a_newer_release_that_takes_the_vault_over_ends_an_older_ones_writes(vault: Vault) -> None:
    newer = replace(vault.header, format=2).encode()
    db = sqlite3.connect(vault.directory / "vault.db")
    db.execute("UPDATE meta SET value = ? WHERE name = 'header'", (newer,))
    db.commit()
    db.close()
    with pytest.raises(VaultVersionError, match="format 2"):
        vault.namespace().put(Kind.RESPONSES, b"a", b"1")
    assert not vault.db.rows("SELECT * FROM objects")


@pytest.mark.parametrize("name", ["vault.db", "vault.db-wal", "vault.db-shm", "lock"])
@pytest.mark.parametrize("how", ["empty", "truncate", "swap", "delete"])
def test_a_file_of_the_database_that_was_changed_gives_a_state_that_was_written_or_none(
    vault: Vault, tmp_path: Path, name: str, how: str
) -> None:
    """Without the newest of the log it is as it was before: nothing else than was written."""
    space = vault.namespace()
    for said in (b"1", b"2"):
        space.append(Kind.HISTORY, b"talk", [said * 5000])
    copy = tmp_path / "copy"
    shutil.copytree(vault.directory, copy)  # with its log, as after a crash
    file = copy / name
    if how == "empty":
        file.write_bytes(b"")
    elif how == "truncate":
        file.write_bytes(file.read_bytes()[:file.stat().st_size * 2 // 3])
    elif how == "swap":
        other = copy / ("vault.db-wal" if name != "vault.db-wal" else "vault.db")
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        file.unlink()
    try:
        with Vault(copy, vault.keys.keyholder) as opened:
            held = opened.namespace().records(Kind.HISTORY, b"talk")
    except VaultError:
        return
    assert held in ([], [b"1" * 5000], [b"1" * 5000, b"2" * 5000])


@pytest.mark.parametrize("column", [
    "objects SET size = -1", "objects SET size = 0.5", "objects SET file = CAST(file AS BLOB)",
    "records SET version = -1", "records SET sealed = 'x'", "keys SET epoch = 'x'",
    "meta SET value = 'x'", "meta SET value = 7", "objects SET hour = 'x', used = 'x'",
])
def test_a_column_of_another_type_is_damage_and_no_crash(vault: Vault, column: str) -> None:
    vault.namespace().put(Kind.RESPONSES, b"a", b"1")
    vault.namespace().put_large(Kind.PREFIX, b"kv", [b"2"])
    edit(vault, f"UPDATE {column}")
    with contextlib.suppress(VaultDamaged, KeyDamaged), \
            Vault(vault.directory, vault.keys.keyholder) as vault:
        space = vault.namespace()
        assert space.get(Kind.RESPONSES, b"a") == b"1"
        space.trim(Kind.RESPONSES, Retention(hours=24, most_bytes=1000))
        space.trim(Kind.PREFIX, Retention(hours=24))
        space.get_large(Kind.PREFIX, b"kv")


def test_segments_that_no_row_names_are_removed_when_nobody_else_is_here(vault: Vault) -> None:
    vault.namespace().put_large(Kind.PREFIX, b"kv", [b"state"])
    folder = vault.directory / "segments"
    for name in ("0" * 32, "1" * 32 + ".part", "not-ours"):
        (folder / name).touch()
    with Vault(vault.directory, vault.keys.keyholder):
        assert len(list(folder.iterdir())) == 4  # the other one might be writing them
    with again(vault) as vault:
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 2
        assert "not-ours" in left
        assert vault.namespace().get_large(Kind.PREFIX, b"kv") == b"state"


def test_a_full_disk_is_named_and_keeps_what_was_there(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = vault.namespace()
    space.put_large(Kind.PREFIX, b"kv", [b"old"])
    space.put(Kind.RESPONSES, b"a", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "open", full)
        with pytest.raises(NotEnoughDisk):
            space.put_large(Kind.PREFIX, b"kv", [b"new"])
    pages = vault.db.rows("PRAGMA page_count")[0][0]
    vault.db.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(NotEnoughDisk):
        space.append(Kind.RESPONSES, b"a", [b"x" * 100_000])
    with pytest.raises(NotEnoughDisk):
        vault.namespace("new").append(Kind.DISTILL, b"a", [b"x" * 100_000])
    vault.db.rows("PRAGMA max_page_count = 1000000")
    vault.namespace("new").put(Kind.DISTILL, b"a", b"fits")
    with again(vault) as vault:
        assert vault.namespace().get_large(Kind.PREFIX, b"kv") == b"old"
        assert vault.namespace().records(Kind.RESPONSES, b"a") == [b"old"]
        assert vault.namespace("new").get(Kind.DISTILL, b"a") == b"fits"


def test_a_write_that_is_given_up_half_way_leaves_no_trace(vault: Vault) -> None:
    space = vault.namespace()
    space.append(Kind.HISTORY, b"talk", [b"1"])

    def contents():
        yield b"2"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        space.append(Kind.HISTORY, b"talk", contents())
    with pytest.raises(KeyboardInterrupt):
        vault.namespace("new").append(Kind.HISTORY, b"talk", contents())
    with pytest.raises(KeyboardInterrupt):
        space.put_large(Kind.PREFIX, b"kv", contents())
    assert not list((vault.directory / "segments").iterdir())
    vault.namespace("new").append(Kind.HISTORY, b"talk", [b"3"])
    with again(vault) as vault:
        assert vault.namespace().records(Kind.HISTORY, b"talk") == [b"1"]
        assert vault.namespace("new").records(Kind.HISTORY, b"talk") == [b"3"]


def test_a_fork_may_not_go_on_with_its_parents_vault(vault: Vault) -> None:
    vault.namespace().put(Kind.RESPONSES, b"a", b"1")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            vault.namespace().put(Kind.RESPONSES, b"a", b"2")
        except VaultError:
            vault.close()
            code = 0
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert vault.namespace().get(Kind.RESPONSES, b"a") == b"1"


def busy(directory: Path, keyholder: Keyholder, number: int, seed: int, count: int) -> None:
    """Mixed operations on objects that all share, and a conversation of its own."""
    rng = random.Random(seed + number)
    with Vault(directory, keyholder) as vault:
        space = vault.namespace()
        for step in range(count):
            name = b"%d" % rng.randrange(20)
            action = rng.randrange(6)
            if action == 0:
                space.put(Kind.RESPONSES, name, name * 50)
            elif action == 1:
                assert space.get(Kind.RESPONSES, name) in (None, name * 50)
            elif action == 2:
                space.put_large(Kind.PREFIX, name, [name * 5000])
            elif action == 3:
                assert space.get_large(Kind.PREFIX, name) in (None, name * 5000)
            elif action == 4:
                space.forget(Kind.PREFIX, name)
                if rng.random() < 0.2:
                    space.shred(Kind.RESPONSES)
            else:
                space.append(Kind.HISTORY, b"talk %d" % number, [b"%d" % step])
        assert space.records(Kind.HISTORY, b"talk %d" % number)


def test_processes_share_a_vault_and_none_is_turned_away(vault: Vault) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    context = multiprocessing.get_context("spawn")
    vault.close()
    processes = [
        context.Process(target=busy, args=(
            vault.directory, vault.keys.keyholder, number, seed, 120))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4
    with Vault(vault.directory, vault.keys.keyholder) as vault:
        kept = {row[0] for row in vault.db.rows("SELECT file FROM objects WHERE file NOT NULL")}
        assert {path.name for path in (vault.directory / "segments").iterdir()} == kept
