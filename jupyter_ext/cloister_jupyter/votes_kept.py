"""Blind comparisons in the vault: how tiers were asked, what they answered, and every vote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from cloister.errors import OutputExists, SettingError, VaultDamaged
from cloister.records import Record, Whole, decode
from cloister.vault.namespace import Kind
from cloister_jupyter.ballot import Mark
from cloister_jupyter.kept import Kept, forget

if TYPE_CHECKING:
    from cloister.vault.namespace import Namespace

__all__ = ["Form", "KeptVotes"]

_RECORD_BYTES = 64 << 20
_T = TypeVar("_T")
_MOST_NAME = 200  # characters
# No conversation is called so: FF is in no text's UTF-8.
_NAMES, _VOTES = b"\xfflab votes", b"\xfflab votes "


class Form(Record, frozen=True):
    """How a comparison is asked. Its repr shows no text."""

    prompts: tuple[str, ...]
    system: str
    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    tiers: tuple[str, ...]  # names in the lab
    seed: Whole  # of the order and of the sides

    def __repr__(self) -> str:
        return "Form()"


class _Names(Record, frozen=True):
    names: tuple[str, ...]


class KeptVotes:
    """The comparisons of a namespace, by name.

    Raises (from its methods):
        VaultError: see `Namespace`; VaultDamaged where another release wrote it.
    """

    def __init__(self, space: Namespace) -> None:
        self._space = space

    def names(self) -> list[str]:
        """Return the names of all comparisons, the latest last."""
        raw = self._space.get(Kind.HISTORY, _NAMES)
        return [] if raw is None else list(_decode(raw, _Names).names)

    def begin(self, name: str, form: Form) -> None:
        """Keep how a comparison is asked, before anything is.

        Raises:
            SettingError: the name is too long.
            OutputExists: there is one of that name.
        """
        if not 0 < len(name) <= _MOST_NAME:
            raise SettingError(f"A vote's name has 1 to {_MOST_NAME} characters; choose another.")
        if self._space.has(Kind.HISTORY, _of(name)):
            raise OutputExists("There is a vote of that name; go on with it, or choose another.")
        self._space.append(Kind.HISTORY, _of(name), [msgspec.json.encode(form)])
        self._put_names([*self.names(), name])

    def read(self, name: str) -> tuple[Form, list[Mark]]:
        """Return how a comparison is asked, and its votes.

        Raises:
            SettingError: there is none of that name.
        """
        records = self._space.records(Kind.HISTORY, _of(name))
        if not records:
            raise SettingError("There is no vote of that name; choose one of the list.")
        return _decode(records[0], Form), [_decode(each, Mark) for each in records[1:]]

    def append(self, name: str, mark: Mark) -> None:
        """Keep a vote, or that one was taken back: on the disk before this returns."""
        self._space.append(Kind.HISTORY, _of(name), [msgspec.json.encode(mark)])

    def answers(self, name: str) -> Kept:
        """Return what keeps the answers of a comparison."""
        return Kept(self._space, _answers_of(name))

    def forget(self, name: str) -> None:
        """Delete a comparison, its answers and their keys; its name comes off the list."""
        forget(self._space, _answers_of(name))
        self._space.forget(Kind.HISTORY, _of(name))
        self._put_names([each for each in self.names() if each != name])

    def _put_names(self, names: list[str]) -> None:
        self._space.put(Kind.HISTORY, _NAMES, msgspec.json.encode(_Names(names=tuple(names))))


def _answers_of(name: str) -> str:
    return f"votes\0{name}"


def _of(name: str) -> bytes:
    return _VOTES + name.encode("utf-8", "surrogatepass")


def _decode(raw: bytes, kind: type[_T]) -> _T:
    return decode(raw, kind, limit_bytes=_RECORD_BYTES, refuse=lambda complaint: VaultDamaged(
        f"What is kept of this vote was written by another release ({complaint}); forget it."))
