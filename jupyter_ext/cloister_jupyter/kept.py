"""What a tier answered, and answers in the vault, for a grid that goes on another day."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import SettingError, VaultDamaged
from cloister.records import Finite, Record, Sha256, Whole, decode
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from cloister.vault.namespace import Namespace
    from cloister_jupyter.checks import Outcome

__all__ = ["TOOK", "Answer", "Kept", "Place", "forget", "other_release"]

_RECORD_BYTES = 64 << 20
_MOST_NAME = 256  # characters

Place = tuple[int, int, int | None]
"""Prompt and case, counted from 0, and seed."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a tier answered at a place, and what that took. Its repr shows no text."""

    tier: str
    place: Place
    text: str = field(repr=False)
    finish: str = ""  # end, length or context; empty where it failed
    error: str = ""  # the named error that it failed with
    tokens: int = 0
    ttft_s: float = 0.0
    decode_tokens_per_s: float | None = None
    peak_rss_bytes: int = 0  # of the tier's process
    kept: bool = False  # it was there before this run
    outcome: Outcome | None = None  # None: nothing was wanted of it


class Kept:
    """The answers of a grid in the vault, under a name; forgotten as one, with its key.

    Beside them stands how the grid was asked, as its user wrote it. Without a vault all is kept in
    memory, as long as this object.

    Raises (from its methods):
        VaultError: see `Namespace`.
    """

    def __init__(self, space: Namespace | None, name: str) -> None:
        """Take up what is kept under `name`.

        Raises:
            SettingError: the name is empty or too long.
            VaultDamaged: what is kept is not what was written.
        """
        if not 0 < len(name) <= _MOST_NAME:
            raise SettingError(f"A grid's name has 1 to {_MOST_NAME} characters; choose another.")
        self._space = space
        self._name, self._form_name = _names(name)
        found = [
            decode(record, _Record, limit_bytes=_RECORD_BYTES, refuse=other_release)
            for record in (space.records(Kind.HISTORY, self._name) if space is not None else ())]
        self._answers = {record.key: record for record in found}

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str, tier: str, place: Place) -> Answer | None:
        """Return the answer to the inputs of a key; None where there is none."""
        record = self._answers.get(key)
        if record is None:
            return None
        took = {name: getattr(record, name) for name in _KEPT}
        return Answer(tier=tier, place=place, kept=True, **took)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer: on the disk before this returns."""
        record = _Record(key=key, **{name: getattr(answer, name) for name in _KEPT})
        if self._space is not None:
            self._space.append(Kind.HISTORY, self._name, [msgspec.json.encode(record)])
        self._answers[key] = record

    def put_form(self, form: bytes) -> None:
        """Keep how the grid is asked."""
        if self._space is not None:
            self._space.put(Kind.HISTORY, self._form_name, form)

    def form(self) -> bytes | None:
        """Return how the grid was asked; None where that is not kept."""
        return None if self._space is None else self._space.get(Kind.HISTORY, self._form_name)

    def forget(self) -> bool:
        """Delete all answers, how they were asked for, and their keys; False where there are none.
        """
        some = bool(self._answers)
        self._answers.clear()
        return some if self._space is None else _forget(self._space, self._name, self._form_name)


def forget(space: Namespace, name: str) -> bool:
    """Delete what is kept under a name, also what cannot be read; False where there is nothing."""
    return _forget(space, *_names(name))


def _forget(space: Namespace, *names: bytes) -> bool:
    gone = [space.forget(Kind.HISTORY, each) for each in names]
    return any(gone)


def _names(name: str) -> tuple[bytes, bytes]:
    """Return what the answers of a grid are called in the vault, and how it was asked."""
    # No conversation is called so: FF is in no text's UTF-8.
    answers = b"\xfflab grid " + name.encode("utf-8", "surrogatepass")
    return answers, b"\xfflab grid's form " + answers


class _Record(Record, frozen=True):
    """An answer as it is kept, with the hash of its inputs."""

    key: Sha256
    text: str
    finish: str
    tokens: Whole
    ttft_s: Finite
    decode_tokens_per_s: Finite | None
    peak_rss_bytes: Whole

    def __repr__(self) -> str:
        return "_Record()"


TOOK = tuple(name for name in _Record.__struct_fields__ if name not in ("key", "text"))
"""Fields of an answer that say what it took."""
_KEPT = ("text", *TOOK)


def other_release(complaint: str) -> VaultDamaged:
    """Return the error that what is kept cannot be read."""
    return VaultDamaged(
        f"What is kept of this grid was written by another release ({complaint}); forget it.")
