"""A conversation that is kept: what was said under a name, and the KV state to go on from.

Record 0 of the object says with which model and system prompt it was begun; each other record is a
message, or the names of cached objects that stand for it and must go when it goes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cloister.errors import SessionMismatch, SettingError
from cloister.tokenizer import Message
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cloister.runtime.prefix import PrefixCache
    from cloister.vault.namespace import Namespace

__all__ = ["Conversation", "forget"]

_MOST = 256  # characters of a name


class Conversation:
    """A named conversation with the engine of `prefixes`, in its namespace."""

    def __init__(self, prefixes: PrefixCache, name: str, *, system: str | None) -> None:
        """Take up the conversation called `name`, or begin it.

        Raises:
            SettingError: the name is empty or too long.
            SessionMismatch: it was begun with another model or system prompt.
            VaultError: the vault cannot be read.
        """
        self._name, self._prefixes = _encoded(name), prefixes
        self._space = prefixes.space
        rows = _records(self._space, self._name)
        model = prefixes.engine.model_id
        if rows and rows[0]["model"] != model:
            raise SessionMismatch(
                "A session of that name was held with another bundle; use that bundle, or name "
                "another session."
            )
        if rows and system not in (None, rows[0]["system"]):
            raise SessionMismatch(
                "A session of that name has another system prompt; leave --system out, or name "
                "another session."
            )
        self.system = rows[0]["system"] if rows else system
        self.messages = [
            Message(role=row["role"], content=row["content"]) for row in rows if "role" in row]
        self._kept = {name for row in rows for name in row.get("kept", ())}
        self._records = len(rows)
        self.restored = prefixes.resume(self._name) if rows else 0  # positions

    def __repr__(self) -> str:
        return f"Conversation({len(self.messages)} messages)"

    def add(self, messages: Iterable[Message]) -> None:
        """Keep what was said since, and the state of the engine.

        What was said is on the disk before this returns; the state is a cache.

        Raises:
            SessionMismatch: another process went on with it, or deleted it; nothing is kept.
            NotEnoughDisk, VaultError: see `Namespace.append`.
        """
        messages = list(messages)
        rows: list[dict[str, object]] = []
        if not self._records:
            rows.append({"model": self._prefixes.engine.model_id, "system": self.system})
        rows += [{"role": message.role, "content": message.content} for message in messages]
        # Names before what they name: what is kept can always be forgotten.
        names = {name.hex() for name in self._prefixes.names(self._name)} - self._kept
        if names:
            rows.append({"kept": sorted(names)})
        records = [json.dumps(row).encode() for row in rows]
        if not self._space.append(Kind.HISTORY, self._name, records, after=self._records):
            raise SessionMismatch(
                "Another process went on with this session, or deleted it; open it again, or name "
                "another session."
            )
        self._records += len(records)
        self.messages = [*self.messages, *messages]
        self._kept |= names
        self._prefixes.keep(self._name)
        if not self._space.has(Kind.HISTORY, self._name):  # deleted in between
            for name in names:
                self._space.forget(Kind.PREFIX, bytes.fromhex(name))


def forget(space: Namespace, name: str) -> bool:
    """Delete a conversation and all KV state that it left; False where there is none.

    Blocks that other conversations share go with it: they are made again.

    Raises:
        SettingError: the name is empty or too long.
        VaultError: the vault cannot be written.
    """
    encoded = _encoded(name)
    for row in _records(space, encoded):
        for kept in row.get("kept", ()):
            space.forget(Kind.PREFIX, bytes.fromhex(kept))
    return space.forget(Kind.HISTORY, encoded)


def _encoded(name: str) -> bytes:
    if not 0 < len(name) <= _MOST:
        raise SettingError(f"A session's name has 1 to {_MOST} characters; choose another.")
    return name.encode("utf-8", "surrogatepass")


def _records(space: Namespace, name: bytes) -> Sequence[dict[str, Any]]:
    return [json.loads(record) for record in space.records(Kind.HISTORY, name)]
