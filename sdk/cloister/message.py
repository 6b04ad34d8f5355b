"""What is said in a conversation: messages, and the tool calls and results among them."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloister.parts import Content, Media  # noqa: TC001  # msgspec reads the annotations

__all__ = ["Message", "ToolCall"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool that the model asks for, by name. Its repr does not show the arguments."""

    name: str
    arguments: dict[str, object] = field(repr=False)  # JSON values


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. Its repr does not show what was said."""

    role: str  # system, user, assistant or tool
    content: Content = field(repr=False)  # of a tool: its result
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant; the content is their text
    name: str | None = None  # of the tool whose result this is

    def __post_init__(self) -> None:
        if not isinstance(self.content, str | tuple):  # a list, as callers write it
            object.__setattr__(self, "content", tuple(self.content))

    @property
    def text(self) -> str:
        """The texts of the content, one behind the other."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def media(self) -> tuple[Media, ...]:
        """The pictures and recordings of the content."""
        if isinstance(self.content, str):
            return ()
        return tuple(part for part in self.content if not isinstance(part, str))
