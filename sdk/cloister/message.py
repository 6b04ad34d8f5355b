"""What is said in a conversation: messages, and the tool calls and results among them.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    content: str = field(repr=False)  # of a tool: its result
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant; the content is their text
    name: str | None = None  # of the tool whose result this is
