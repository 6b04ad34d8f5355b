"""A conversation that is kept: what was said under a name, and the KV state to go on from.

Record 0 of the object says its name and with which model and system prompt it was begun; each other
record is a message, or the names of cached objects that stand for it and must go when it goes, or
the pixels or samples of a picture or recording, once, which messages name by their digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cloister.errors import SessionMismatch, SettingError
from cloister.message import Message, ToolCall
from cloister.parts import Picture, Recording
from cloister.vault.namespace import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cloister.runtime.core import Position
    from cloister.runtime.prefix import PrefixCache
    from cloister.vault.namespace import Identity, Namespace

__all__ = ["Conversation", "Listed", "export", "forget", "listed"]

_MOST = 256  # characters of a name
_BINARY = b"\0"  # begins a record of pixels or samples, and ends what it says of them
_Media = dict[str, Picture | Recording]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A conversation in a list of all. Its repr shows no text."""

    id: str  # in hexadecimal; says nothing of the name
    name: str = field(repr=False)
    hours: int  # since it was gone on with
    size_bytes: int  # on disk, without the KV state


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
        rows, media = _records(self._space, self._name)
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
        self.messages = [_message(row, media) for row in rows if "role" in row]
        self._cached_names = {name for row in rows for name in row.get("kept", ())}
        self._media, self._records = set(media), len(rows) + len(media)
        self._identity = self._space.identity(Kind.HISTORY, self._name)
        self.restored = prefixes.resume(self._name) if rows else 0  # positions

    def __repr__(self) -> str:
        return f"Conversation({len(self.messages)} messages)"

    def catch_up(self, messages: Sequence[Message]) -> None:
        """Keep what `messages` have beyond those that are kept, after a worker's death.

        Raises:
            SessionMismatch: the two went on differently.
        """
        both = min(len(messages), len(self.messages))
        mine, kept = list(messages[:both]), self.messages[:both]
        # Of the answer at which the worker died more may have been kept than the client heard of.
        heard = mine and mine[-1].role == "assistant" and kept[-1].role == "assistant" and (
            kept[-1].text.startswith(mine[-1].text))
        if mine != kept and not (mine[:-1] == kept[:-1] and heard):
            raise SessionMismatch(
                "A session of that name went on otherwise than this conversation; name another "
                "session."
            )
        if len(messages) > both:
            self.add(messages[both:])

    def check(self) -> None:
        """Raise SessionMismatch where another process went on with it, or deleted it."""
        if self._identity != self._space.identity(Kind.HISTORY, self._name) or (
                self._records != len(self._space.numbers(Kind.HISTORY, self._name))):
            raise _gone_on()

    def add(
        self, messages: Iterable[Message], positions: Sequence[Position] = (), *,
        after: int | None = None,
    ) -> None:
        """Keep what was said since, and the state of the engine after `positions`.

        What was said is on the disk before this returns; the state is a cache. What was said behind
        the first `after` messages is deleted, with its key and its state.

        Raises:
            SessionMismatch: another process went on with it, or deleted it; nothing is kept.
            NotEnoughDisk, VaultError: see `Namespace.append`.
        """
        before = self.messages[:after]
        again = len(before) < len(self.messages)
        said = [*before, *messages]
        rows: list[dict[str, object]] = []
        if again or not self._records:
            rows.append({
                "model": self._prefixes.engine.model_id, "system": self.system,
                "name": self._name.decode("utf-8", "surrogatepass")})
        added = said if again else said[len(before):]
        rows += [_row(message) for message in added]
        media = {_digest(part): part for message in added for part in _kept_media(message)}
        names = [name.hex() for name in self._prefixes.names(positions, self._name)]
        blocks, known = set(names[:-1]), self._cached_names
        gone = known - blocks if again else set()
        # Names before what they name: what is kept can always be forgotten.
        new = set(names) - (set() if again else known)
        if new:
            rows.append({"kept": sorted(new)})
        records = [json.dumps(row).encode() for row in rows]
        records += [
            _packed(part) for digest, part in media.items() if again or digest not in self._media]
        identity = self._write(records, [bytes.fromhex(name) for name in gone], again=again)
        if identity is None:
            raise _gone_on()
        self._records = len(records) + (0 if again else self._records)
        self.messages, self._identity = said, identity
        self._cached_names = new if again else known | new
        self._media = set(media) if again else self._media | set(media)
        if positions:  # otherwise nothing was read, and what is kept stays
            self._prefixes.keep(positions, self._name, identity)

    def forget(self) -> None:
        """Delete it and all KV state that it left; it begins anew, after its system prompt."""
        _forget(self._space, self._name)
        self.messages, self._cached_names, self._media = [], set(), set()
        self._records, self._identity = 0, None

    def _write(
        self, records: list[bytes], gone: list[bytes], *, again: bool
    ) -> Identity | None:
        if not again:
            return self._space.append(
                Kind.HISTORY, self._name, records, after=self._records, to=self._identity)
        assert self._identity is not None, "it has messages"
        return self._space.rewrite(
            Kind.HISTORY, self._name, records, after=self._records, to=self._identity,
            without=[(Kind.PREFIX, name) for name in gone])


def forget(space: Namespace, name: str) -> bool:
    """Delete a conversation and all KV state that it left; False where there is none.

    Blocks that other conversations share go with it: they are made again.

    Raises:
        SettingError: the name is empty or too long.
        VaultError: the vault cannot be written.
    """
    return _forget(space, _encoded(name))


def _forget(space: Namespace, name: bytes) -> bool:
    return space.forget(Kind.HISTORY, name, also=lambda records: [
        (Kind.PREFIX, bytes.fromhex(kept))
        for row in _read(records)[0] for kept in row.get("kept", ())])


def _gone_on() -> SessionMismatch:
    return SessionMismatch(
        "Another process went on with this session, or deleted it; open it again, or name another "
        "session.")


def listed(space: Namespace) -> list[Listed]:
    """Return the conversations of a namespace, the newest first.

    Raises:
        VaultError: the vault cannot be read.
    """
    found = []
    for entry in space.entries(Kind.HISTORY):
        try:
            row = json.loads(entry.first or b"")
        except ValueError:  # what the lab keeps
            continue
        if isinstance(row, dict) and "model" in row and isinstance(row.get("name"), str):
            found.append(Listed(id=entry.tag.hex(), name=row["name"], hours=entry.hours,
                                size_bytes=entry.size_bytes))
    return found


def export(space: Namespace, name: str) -> dict[str, Any]:
    """Return what was said in a conversation, ready for JSON.

    A picture or recording is its size or length, in brackets.

    Raises:
        SettingError: there is none of that name.
        VaultError: the vault cannot be read.
    """
    rows, media = _records(space, _encoded(name))
    if not rows:
        raise SettingError("There is no such conversation any more; look again.")
    return {
        "name": name, "model": rows[0]["model"], "system": rows[0]["system"],
        "messages": [
            {**row, "content": _message(row, media).shown} for row in rows if "role" in row]}


def _encoded(name: str) -> bytes:
    if not 0 < len(name) <= _MOST:
        raise SettingError(f"A session's name has 1 to {_MOST} characters; choose another.")
    return name.encode("utf-8", "surrogatepass")


def _records(space: Namespace, name: bytes) -> tuple[list[dict[str, Any]], _Media]:
    return _read(space.records(Kind.HISTORY, name))


def _read(records: Sequence[bytes]) -> tuple[list[dict[str, Any]], _Media]:
    """Return the rows among `records`, and pictures and recordings by their digests."""
    rows, media = [], _Media()
    for record in records:
        if record.startswith(_BINARY):
            part = _unpacked(record)
            media[_digest(part)] = part
        else:
            rows.append(json.loads(record))
    return rows, media


def _packed(part: Picture | Recording) -> bytes:
    """Return the record of a picture or recording: what it is, in JSON, then its data."""
    header: dict[str, object]
    if isinstance(part, Recording):
        header = {"rate": part.rate}
    else:
        header = {"size": [part.height, part.width], "grid": part.grid}
        if part.lines > 1:
            header["lines"] = part.lines
    return _BINARY + json.dumps(header).encode() + _BINARY + part.data


def _unpacked(record: bytes) -> Picture | Recording:
    _, header, data = record.split(_BINARY, 2)
    said = json.loads(header)
    if "rate" in said:
        return Recording(data=data, rate=said["rate"])
    height, width = said["size"]
    return Picture(data=data, height=height, width=width, grid=tuple(said["grid"]),
                   lines=said.get("lines", 1))


def _digest(part: Picture | Recording) -> str:
    return hashlib.sha256(_packed(part)).hexdigest()


def _kept_media(message: Message) -> list[Picture | Recording]:
    return [part for part in message.media if isinstance(part, Picture | Recording)]


def _row(message: Message) -> dict[str, object]:
    content = message.content if isinstance(message.content, str) else [
        {"media": _digest(part)} if isinstance(part, Picture | Recording) else part
        for part in message.content]
    row: dict[str, object] = {"role": message.role, "content": content}
    if message.tool_calls:
        row["calls"] = [[call.name, call.arguments] for call in message.tool_calls]
    if message.name is not None:
        row["name"] = message.name
    return row


def _message(row: dict[str, Any], media: _Media) -> Message:
    calls = tuple(ToolCall(name=name, arguments=held) for name, held in row.get("calls", ()))
    content = row["content"]
    if not isinstance(content, str):
        content = tuple(part if isinstance(part, str) else media[part["media"]] for part in content)
    return Message(role=row["role"], content=content, tool_calls=calls, name=row.get("name"))
