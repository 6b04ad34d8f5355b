"""What is forgotten leaves nothing behind, whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest

from cloister.bundle import Bundle
from cloister.runtime import prefix
from cloister.runtime.conversation import forget
from cloister.runtime.engine import Engine
from cloister.runtime.prefix import PrefixCache
from cloister.runtime.program import FakeProgram
from cloister.runtime.session import Session
from cloister.vault.namespace import Kind, Namespace
from cloister.vault.store import Vault


@pytest.fixture
def talk(vault: Vault, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A conversation called "work" of one turn, in blocks of four positions."""
    monkeypatch.setattr(prefix, "BLOCK", 4)
    engine = Engine(
        bundle.path, load=lambda *_, **__: FakeProgram(300, 64, prefer=tuple(range(70, 90))),
        runs_here=lambda backend: True)
    session = Session(engine, vault=vault, name="work")
    assert list(session.stream("the quick brown fox", max_tokens=3))
    assert set(vault.namespace().sizes()) == {Kind.HISTORY, Kind.PREFIX}
    return session


def test_a_turn_that_ends_after_its_conversation_was_forgotten_leaves_no_state(
    vault: Vault, talk: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process forgets between what was said and the state of the engine."""
    keep = PrefixCache.keep

    def late(*given: Any, **options: Any) -> None:
        assert forget(vault.namespace(), "work")
        keep(*given, **options)

    monkeypatch.setattr(PrefixCache, "keep", late)
    list(talk.stream("jumps over the lazy dog", max_tokens=3))
    assert vault.namespace().sizes() == {}
    assert not list((vault.directory / "segments").iterdir())


def test_a_turn_that_is_kept_while_its_conversation_is_forgotten_leaves_no_state(
    vault: Vault, talk: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process reads what is to be forgotten, and another tries to go on before it is done."""
    records = Namespace.records

    def read(space: Namespace, *given: Any) -> list[bytes]:
        found = records(space, *given)
        monkeypatch.setattr(Namespace, "records", records)
        with Vault(vault.directory, vault.keys.keyholder) as other:
            other.db.rows("PRAGMA busy_timeout = 50")
            with pytest.raises(Exception, match="busy"):
                other.namespace().append(Kind.HISTORY, b"work", [b"{}"])
        return found

    monkeypatch.setattr(Namespace, "records", read)
    assert forget(vault.namespace(), "work")
    assert vault.namespace().sizes() == {}


def test_shredding_the_history_takes_the_state_of_a_conversation_along(
    vault: Vault, talk: Session, bundle: Bundle
) -> None:
    space = vault.namespace()
    space.put(Kind.RESPONSES, b"a", b"1")
    assert space.shred(Kind.HISTORY) > 1
    model = bytes.fromhex(bundle.model_id(bundle.manifest.programs[0]))
    assert list(space.everything(model)) == [b"1"]
