"""What is asked: texts, pictures and recordings, and the tokens that they become. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cloister.errors import ContextExceeded, SettingError, UnsupportedMedia
from cloister.message import Message
from cloister.parts import Audio, Image, Media

if TYPE_CHECKING:
    from cloister.pieces import MediaFormats

__all__ = ["Count", "Prompt", "decoded", "messages_of", "refuse_undecoded"]

Prompt = str | Media | Message | Sequence[Message] | Sequence[str | Media]
"""A question: the content of a user's message, or messages."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """The tokens of a prompt: those of text, and vectors of pictures and of recordings."""

    text: int  # the template's, and the texts around pictures and recordings, included
    picture: int = 0
    recording: int = 0
    pictures: int = 0  # how many there are
    recordings: int = 0

    @property
    def total(self) -> int:
        """All of them, which the context has to hold."""
        return self.text + self.picture + self.recording

    def check(self, context: int) -> None:
        """Raise ContextExceeded unless a context of so many tokens has room for one more."""
        if self.total < context:
            return
        shares = "".join(
            f", {tokens} of them of {number} {kind}{'s' * (number > 1)},"
            for kind, tokens, number in (
                ("picture", self.picture, self.pictures),
                ("recording", self.recording, self.recordings)) if number).replace(",,", ",")
        raise ContextExceeded(
            f"The prompt has {self.total} tokens{shares} and the context holds {context}, one of "
            "them for the answer; shorten it.")


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    """Return the messages that a caller of `Chat.stream` means.

    Raises:
        SettingError: messages among the parts of one.
    """
    if isinstance(prompt, Message):
        return (prompt,)
    if isinstance(prompt, str | Media):
        return (Message(role="user", content=prompt if isinstance(prompt, str) else (prompt,)),)
    items = tuple(prompt)
    messages = tuple(item for item in items if isinstance(item, Message))
    if len(messages) == len(items):
        return messages
    if messages:
        raise SettingError(
            "A question has messages among the parts of one; give either, or put the parts into a "
            "message.")
    parts = tuple(item for item in items if not isinstance(item, Message))
    texts = [part for part in parts if isinstance(part, str)]
    return (Message(role="user", content=parts if len(texts) < len(parts) else "".join(texts)),)


def decoded(messages: Sequence[Message], formats: MediaFormats | None) -> tuple[Message, ...]:
    """Return `messages`, their files and arrays decoded for a model of `formats`.

    Raises:
        UnsupportedMedia: the model takes none of a kind.
        MediaTooLarge, MediaUnreadable: see `cloister.media.read`.
    """
    return tuple(_decoded(message, formats) for message in messages)


def refuse_undecoded(messages: Sequence[Message]) -> None:
    """Raise UnsupportedMedia where a picture or recording is as it was given."""
    if any(isinstance(part, Image | Audio) for message in messages for part in message.media):
        raise UnsupportedMedia(
            "A picture or recording came to the worker as a file, which it never decodes; send "
            "what `cloister.media.read` makes of it.")


def _decoded(message: Message, formats: MediaFormats | None) -> Message:
    if not any(isinstance(part, Image | Audio) for part in message.media):
        return message
    if formats is None:
        raise UnsupportedMedia(
            "This model reads text only; leave the picture or recording out, or choose another "
            "model.")
    from cloister import media

    def read(part: str | Media) -> str | Media:
        return media.read(part, formats) if isinstance(part, Image | Audio) else part

    return replace(message, content=tuple(map(read, message.content)))
