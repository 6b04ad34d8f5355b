"""What is said in a conversation: messages, and the tool calls and results among them."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloister.errors import SettingError
from cloister.parts import Content, Media  # msgspec reads the annotations

__all__ = ["Message", "ToolCall"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool that the model asks for, by name. Its repr does not show the arguments."""

    name: str
    arguments: dict[str, object] = field(repr=False)  # JSON values


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. Its repr does not show what was said.

    Raises:
        SettingError: a part of the content is of another type.
    """

    role: str  # system, user, assistant or tool
    content: Content = field(repr=False)  # of a tool: its result
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant; the content is their text
    name: str | None = None  # of the tool whose result this is

    def __post_init__(self) -> None:
        if isinstance(self.content, str):
            return
        if not isinstance(self.content, tuple):  # a list, as callers write it
            object.__setattr__(self, "content", tuple(self.content))
        if not all(isinstance(part, str | Media) for part in self.content):
            raise SettingError(
                "A part of a message is no text, picture or recording; give a file by `Image.open` "
                "or `Audio.open`.")

    @property
    def text(self) -> str:
        """The texts of the content, one behind the other."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def shown(self) -> str:
        """The content as people read it: a picture or recording is what it is, in brackets."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(
            part if isinstance(part, str) else f"[{part.label}]" for part in self.content)

    @property
    def media(self) -> tuple[Media, ...]:
        """The pictures and recordings of the content."""
        if isinstance(self.content, str):
            return ()
        return tuple(part for part in self.content if not isinstance(part, str))
