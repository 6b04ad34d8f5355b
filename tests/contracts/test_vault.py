"""What is kept is sealed, comes back after a restart, and goes when it is told to."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.contracts.test_cli import refused, run

from cloister import reference
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.keys import Keyholder
from cloister.vault.store import Vault

pytestmark = pytest.mark.slow

OTHER_USER = 65534


@pytest.fixture
def home() -> Path:
    return Settings.from_environment().home


def record(*arguments: str, **options: Any) -> dict[str, Any]:
    done = run(*arguments, "--json", **options)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def chat(*lines: str, session: str = "work", more: tuple[str, ...] = ()) -> dict[str, Any]:
    return record("chat", "nano-1", "--session", session, *more,
                  input="".join(f"{line}\n" for line in lines).encode())


def test_a_conversation_goes_on_after_a_restart_without_being_read_again(home: Path) -> None:
    first = chat("play some jazz", more=("--system", "call"))
    assert first["provider"] == "keyfile"
    assert first["messages"] == 0
    again = chat("and now the weather in Rome")
    assert again["messages"] == 2
    assert again["restored_tokens"] > 10
    apart = chat("and now the weather in Rome", more=("--system", "call", "--namespace", "other"))
    assert apart["messages"] == 0
    small = ("--kv", "int8")
    assert chat("play some jazz", session="small", more=small)["messages"] == 0
    assert chat("play some jazz", session="small", more=small)["restored_tokens"] > 10
    refused(run("chat", "nano-1", "--session", "work", "--system", "intent", input=b"x\n"),
            "system prompt")
    refused(run("chat", "pro", "--session", "work", input=b"x\n"), "another bundle")
    for path in [home / "vault", *(home / "vault").rglob("*"), home / "vault.key"]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_an_answer_is_given_again_only_where_it_was_asked_for(home: Path) -> None:
    asked = ("run", "nano-1", "-", "--system", "call", "--cached")
    first = record(*asked, input=b"play some jazz by somebody or other")
    second = record(*asked, input=b"play some jazz by somebody or other")
    assert second["text"] == first["text"]
    kinds = record("vault", "status")["namespaces"][0]["kinds"]
    assert kinds["responses"]["objects"] == 1
    shutil.rmtree(home / "vault")
    record("run", "nano-1", "-", input=b"play some jazz")
    assert not (home / "vault").exists()


def test_a_vault_is_made_looked_at_rotated_and_emptied(home: Path) -> None:
    made = record("vault", "init")
    assert made["provider"] == "keyfile"
    assert "key file" in made["protects"]
    assert "cannot be told" in made["rollback"]
    assert set(made["memory"]) == {
        "RLIMIT_CORE=0", "PR_SET_DUMPABLE=0", "mlock", "MADV_DONTDUMP"}
    refused(run("vault", "init"), "already")
    chat("play some jazz")
    chat("play some rock", session="second")
    key = (home / "vault.key").read_bytes()
    assert record("vault", "rotate")["epoch"] == 2
    assert (home / "vault.key").read_bytes() != key
    assert chat("more")["messages"] == 2
    assert record("vault", "forget", "work")["forgotten"]
    refused(run("vault", "forget", "work"), "no conversation")
    assert chat("again")["messages"] == 0
    assert record("vault", "shred", "default", "--kind", "prefix")["objects"] > 0
    after = chat("again", session="second")
    assert (after["messages"], after["restored_tokens"]) == (2, 0)
    assert record("vault", "shred", "default")["objects"] > 0
    assert record("vault", "status")["namespaces"] == []
    refused(run("vault", "shred", "default"), "no such namespace")
    shown = run("vault", "status").stdout.decode()
    assert "key rotations" in shown


def test_a_passphrase_opens_what_no_other_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(run("vault", "init", "--provider", "passphrase"), "CLOISTER_PASSPHRASE")
    assert not list(home.glob("vault*"))
    monkeypatch.setenv("CLOISTER_PASSPHRASE", "correct horse")
    assert record("vault", "init", "--provider", "passphrase")["provider"] == "passphrase"
    assert not (home / "vault.key").exists()
    assert chat("play some jazz")["messages"] == 0
    assert chat("play some jazz")["messages"] == 2
    monkeypatch.setenv("CLOISTER_PASSPHRASE", "correct house")
    said = refused(run("vault", "status"), "passphrase is not")
    assert "horse" not in said
    refused(run("chat", "nano-1", "--session", "work", input=b"x\n"), "passphrase is not")
    monkeypatch.delenv("CLOISTER_PASSPHRASE")
    refused(run("vault", "status"), "CLOISTER_PASSPHRASE")


def test_a_vault_with_another_key_is_not_used_where_a_passphrase_is_set(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to the disk may have put one whose key they have in its place."""
    monkeypatch.setenv("CLOISTER_PASSPHRASE", "correct horse")
    assert record("vault", "init")["provider"] == "passphrase"
    (home / "vault").rename(home / "gone")
    Vault.create(home / "vault", Keyholder(keyfile=home / "vault.key")).close()
    refused(run("chat", "nano-1", "--session", "diary", input=b"x\n"), "CLOISTER_PROVIDER=keyfile")
    with Vault(home / "vault", Keyholder(keyfile=home / "vault.key")) as vault:
        assert vault.namespaces() == []
    refused(run("vault", "init", "--beside", "--provider", "keyfile"), "CLOISTER_PROVIDER")
    monkeypatch.setenv("CLOISTER_PROVIDER", "keyfile")
    assert record("vault", "rotate", "--provider", "passphrase")["provider"] == "passphrase"
    monkeypatch.setenv("CLOISTER_PROVIDER", "cloud")
    refused(run("vault", "status"), "keyring, passphrase, keyfile")


def test_a_key_store_that_is_set_up_and_not_installed_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyrings.alt.file.PlaintextKeyring")
    refused(run("vault", "init", "--provider", "keyring"), "cannot be loaded", "keyfile")
    assert "cannot be loaded" in record("vault", "init")["notice"]
    assert record("vault", "status")["provider"] == "keyfile"
    done = run("chat", "nano-1", "--session", "work", "--json", input=b"x\n")
    assert done.returncode == 0, done.stderr


def test_a_vault_that_is_made_on_the_way_says_who_holds_its_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    settings = Settings.from_environment()
    for _ in range(2):
        local.open_vault(settings=settings, create=True, notify=said.append).close()
    assert len(said) == 1
    assert "key provider is keyfile" in said[0]
    with pytest.warns(UserWarning, match="key provider is keyfile"):
        local.open_vault(settings=replace(settings, home=home / "other"), create=True).close()
    monkeypatch.setenv("CLOISTER_HOME", str(home / "new"))
    shown = run("chat", "nano-1", "--session", "work", input=b"x\n")
    assert "keyfile" in shown.stderr.decode()


def test_where_the_key_is_lost_an_empty_vault_stands_beside_the_old_one(home: Path) -> None:
    chat("play some jazz")
    held = {path: path.read_bytes() for path in (home / "vault").rglob("*") if path.is_file()}
    (home / "vault.key").rename(home / "elsewhere")
    refused(run("chat", "nano-1", "--session", "work", input=b"x\n"), "init --beside")
    assert {path: path.read_bytes() for path in held} == held
    assert record("vault", "init", "--beside")["moved"] == "vault-1"
    assert chat("play some jazz")["messages"] == 0
    for path, content in held.items():
        assert (home / "vault-1" / path.relative_to(home / "vault")).read_bytes() == content


def test_a_vault_is_not_moved_from_under_a_process_or_for_nothing(home: Path) -> None:
    record("vault", "init")
    with local.open_vault():
        refused(run("vault", "init", "--beside"), "has the vault open")
    refused(run("vault", "init", "--beside", "--provider", "passphrase"), "CLOISTER_PASSPHRASE")
    assert sorted(path.name for path in home.glob("vault*") if path.is_dir()) == ["vault"]
    assert record("vault", "status")["writes"] == 0


@pytest.mark.parametrize("name", ["vault.db", "lock", "segments", "../vault.key"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_somebody_elses_is_refused(
    home: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """Tried from a child under an ordinary user's id: root may read everything."""
    # Not under tmp_path, whose parents another session of pytest takes from everybody else.
    place = tempfile.TemporaryDirectory()
    request.addfinalizer(place.cleanup)
    Path(place.name).chmod(0o711)
    ours = Path(place.name) / "ours"
    program = (
        "import os, sys; from pathlib import Path\n"
        f"home = Path({str(ours)!r})\n"
        "from cloister.errors import VaultUnsafe, VaultError\n"
        "from cloister.vault.keys import Keyholder\n"
        "from cloister.vault.namespace import Kind\n"
        "from cloister.vault.store import Vault\n"
        "os.setgid(65534); os.setuid(65534)  # what is imported later may not be readable\n"
        "holder = Keyholder(keyfile=home / 'vault.key')\n"
        "make = Vault if (home / 'vault').exists() else Vault.create\n"
        "try:\n"
        "    with make(home / 'vault', holder) as vault:\n"
        "        vault.namespace().put(Kind.RESPONSES, b'a', b'x')\n"
        "        vault.namespace().put_large(Kind.PREFIX, b'a', [b'x'])\n"
        "except VaultError as error: print(type(error).__name__, error)\n"
    )
    ours.mkdir()
    os.chown(ours, OTHER_USER, OTHER_USER)

    def said() -> str:
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        ).stdout

    assert said() == ""
    assert said() == ""
    path = ours / "vault" / name
    os.chown(path, 0, 0)
    assert "Vault" in said()
    os.chown(path, OTHER_USER, OTHER_USER)
    assert said() == ""
    path.chmod(0o500 if path.is_dir() else 0o400)
    if path.name == "vault.key":
        assert said() == ""  # nothing needs to write it
    else:
        assert "Vault" in said()
    path.chmod(0o700 if path.is_dir() else 0o600)
    assert said() == ""


def test_no_canary_is_found_and_the_control_finds_them() -> None:
    """The whole scan, with a distillation on private data."""
    found = record("vault", "scan")
    assert found["found"] == []
    assert {"chat", "traceback", "training data", "answer cache"} <= set(found["planted"])
    assert any("token ids" in each for each in found["control"])
    assert any("JSON" in each for each in found["control"])


def test_draws_that_are_not_private_are_not_asked_to_be_sealed(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(
        json.dumps({"task": "redact", "input": f"{n} birds", "target": "x"}) + "\n"
        for n in range(30)))
    refused(run("distill", "--teacher", str(reference.checkpoint_path("pro")), "--tier", "nano-1",
                "--data", str(data), "--private", "-o", str(tmp_path / "out")), "--draws")


def test_the_header_is_read_without_the_key(home: Path) -> None:
    assert local.header(Settings.from_environment()) is None
    record("vault", "init")
    (home / "vault.key").unlink()
    header = local.header(Settings.from_environment())
    assert header is not None and header.provider == "keyfile"
