"""What is asked of which columns, and how a page says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cloister.errors import EmptyPrompt, InvalidText, PromptError, SettingError
from cloister.message import Message
from cloister.runtime.chat import Ask, Sampling
from cloister_jupyter.sent import read

if TYPE_CHECKING:
    from cloister.parts import Audio, Image
    from cloister_jupyter.attached import Attached

__all__ = ["LIMIT_BYTES", "Request", "request_of"]

LIMIT_BYTES = 1 << 16  # of a prompt and of a system prompt, in UTF-8
_LIKELIEST = 5  # tokens that are kept beside each
_Setting = Literal["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked, of which columns. Its repr does not show the texts.

    Raises:
        EmptyPrompt: there is neither a prompt nor a file.
        PromptError: a text is over LIMIT_BYTES, or no Unicode.
        SettingError: no column, or a value outside its bound.
    """

    run: str  # its id, chosen by who asks
    columns: tuple[str, ...]  # ids
    prompt: str = field(repr=False)
    media: tuple[Image | Audio, ...] = field(default=(), repr=False)  # before the prompt
    again: bool = False  # of a conversation: what was asked about in its place is so again
    system: str | None = field(default=None, repr=False)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = 256

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not isinstance(self.system, str | None):
            raise SettingError("A prompt is a text; give one.")
        if not (self.prompt or self.media or self.again):
            raise EmptyPrompt("There is no prompt; type one first.")
        for name, text in (("prompt", self.prompt), ("system prompt", self.system or "")):
            try:
                size = len(text.encode())
            except UnicodeEncodeError:
                raise InvalidText(f"The {name} is not valid Unicode; type it anew.") from None
            if size > LIMIT_BYTES:
                raise PromptError(
                    f"The {name} has {size:,} bytes and the lab takes {LIMIT_BYTES:,}; shorten it.")
        if not self.columns:
            raise SettingError("No tier is chosen; choose at least one.")
        if self.max_tokens is not None and (
                type(self.max_tokens) is not int or self.max_tokens < 1):
            raise SettingError(f"max_tokens is {self.max_tokens}; it must be at least 1.")

    @property
    def message(self) -> Message:
        """What is asked, as a message."""
        texts = (self.prompt,) if self.prompt else ()
        return Message(
            role="user", content=(*self.media, *texts) if self.media else self.prompt)

    def ask(self, *, forced: tuple[int, ...] = (), max_tokens: int | None = None) -> Ask:
        """Return the question, whose answer begins with the tokens `forced`."""
        return Ask.of(
            self.message, forced=forced, sampling=self.sampling, top=_LIKELIEST,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens)


class _Sent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    run: str
    prompt: str
    sampling: dict[_Setting, int | float]
    max_tokens: int | None
    media: tuple[str, ...] = ()  # ids of files
    again: bool = False
    columns: tuple[str, ...] = ("",)  # where there is one alone it has no name
    system: str | None = None
    after: int | None = None  # messages of a conversation that it follows

    def __repr__(self) -> str:
        return f"_Sent(run={self.run!r})"


def request_of(content: dict[str, Any], attached: Attached) -> Request:
    """Return what a page asks for, the files out of `attached`.

    Raises:
        SettingError: a value of the wrong kind, or outside its bound, or a file that is not there.
        PromptError: see `Request`.
    """
    sent = read(content, _Sent)
    return Request(
        run=sent.run, columns=sent.columns, prompt=sent.prompt,
        media=attached.parts(sent.media), again=sent.again, system=sent.system or None,
        sampling=Sampling(**sent.sampling), max_tokens=sent.max_tokens)
