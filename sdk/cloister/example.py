"""An example: what was said or shown, and the answer wanted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloister.message import Message
from cloister.parts import Audio, Image

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["CHAT", "MEDIA", "NONE", "Example", "tool_call"]

CHAT = "chat"  # task of a conversation
NONE = "none"  # name of the call that answers a request outside every intent
# Fields of a record that name a file.
MEDIA: dict[str, type[Image | Audio]] = {"image": Image, "audio": Audio}


@dataclass(frozen=True, kw_only=True)
class Example:
    """What was said, and the answer wanted. Its repr shows neither."""

    task: str  # what scores are counted by; the system prompt, where there are no turns
    input: str  # the last message before the answer
    target: str
    turns: tuple[Message, ...] = ()  # of a conversation: all before the answer
    files: tuple[tuple[str, Path], ...] = ()  # pictures and recordings before the input, by MEDIA
    place: str = field(default="", compare=False)  # file and number, where it was read

    def __repr__(self) -> str:
        return f"Example(task={self.task!r})"

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation before the answer; a task, unless it is empty, is its system message.

        Raises:
            MediaUnreadable, MediaTooLarge: a picture or recording cannot be read from its file.
        """
        if self.turns:
            return self.turns
        media = tuple(MEDIA[kind].open(path) for kind, path in self.files)
        said = (self.input,) if self.input else ()
        request = Message(role="user", content=(*media, *said) if media else self.input)
        return (Message(role="system", content=self.task), request) if self.task else (request,)

    def to_dict(self) -> dict[str, object]:
        """Return the record of a data file that is read as this example alone."""
        if not self.turns:
            named = {kind: str(path) for kind, path in self.files}
            return {"task": self.task, "input": self.input, "target": self.target, **named}
        earlier: list[dict[str, object]] = [
            {"role": turn.role, "content": turn.text}
            | ({"weight": 0} if turn.role == "assistant" else {}) for turn in self.turns]
        return {"messages": [*earlier, {"role": "assistant", "content": self.target}]}


def tool_call(name: str, arguments: Iterable[tuple[str, str]] = ()) -> str:
    """Return the JSON of a tool call, in the reference family's format.

    Arguments keep their order; one that occurs twice becomes a list; values lose outer spaces.
    """
    merged: dict[str, str | list[str]] = {}
    for key, raw in arguments:
        value, earlier = raw.strip(), merged.get(key)
        if earlier is None:
            merged[key] = value
        elif isinstance(earlier, list):
            earlier.append(value)
        else:
            merged[key] = [earlier, value]
    return json.dumps({"name": name, "arguments": merged}, ensure_ascii=False)
