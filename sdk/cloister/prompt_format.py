"""A chat template said in strings, for runners that have no Jinja; or why it cannot be.

The strings are found by rendering probes, and proved on conversations: the text put together from
them, read by the plain tokenizer, gives the ids of `Tokenizer.encode_chat`. No torch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import tokenizers

from cloister.errors import TokenizerError
from cloister.manifest import Around, PromptFormat
from cloister.message import Message

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cloister.tokenizer import Tokenizer

__all__ = ["assemble", "derive", "prove", "special_ids"]

_CLOCK = re.compile(r"\b(strftime_now|now)\b")
_USER, _ANSWER, _AGAIN, _TASK = "Probe", "Reply", "Second", "Task"
_ROLES, _TASKED = ("user", "assistant", "user"), ("system", "user")
_TEXTS = ("Is it cold?", "two words", " spaces around ", "\n\nlines\nbetween\n", "3 + 4 = 7", "x")


class _Unsayable(Exception):
    """The reason, in words, why a template cannot be said in strings."""


def derive(tokenizer: Tokenizer, directory: Path) -> tuple[PromptFormat | None, str | None]:
    """The prompt format of the template in `directory`, or the reason why it has none.

    `directory` is that of a bundle or checkpoint, and `tokenizer` the one that was read from it.
    """
    template = directory / "chat_template.jinja"
    if template.exists() and _CLOCK.search(template.read_text("utf-8")):
        return None, "the template reads the clock"
    try:
        for strip in (False, True):
            found = _find(tokenizer, strip)
            if prove(found, tokenizer, directory):
                return found, None
    except _Unsayable as reason:
        return None, str(reason)
    return None, (
        "the template changes some texts, or writes a message in another way by what stands "
        "before or after it"
    )


def prove(format_: PromptFormat, tokenizer: Tokenizer, directory: Path) -> bool:
    """Whether `format_` gives the ids that the chat template gives, on a set of conversations."""
    plain = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    try:
        return all(
            plain.encode(assemble(format_, messages), add_special_tokens=False).ids
            == tokenizer.encode_chat(messages)
            for messages in _conversations(format_.system is not None)
        )
    except TokenizerError:
        return False


def assemble(format_: PromptFormat, messages: Sequence[Message]) -> str:
    """The text of a conversation up to the answer that is to come."""
    around = {"system": format_.system, "user": format_.user, "assistant": format_.assistant}
    text = "" if messages and messages[0].role == "system" else format_.begin
    for message in messages:
        strings = around[message.role]
        assert strings is not None, "the template has no system role"
        content = message.text.strip() if format_.strip else message.text
        text += strings.before + content + strings.after
    return text + format_.answer


def special_ids(directory: Path) -> tuple[int, ...]:
    """Ids of the special tokens of the tokenizer in `directory`, which are no text."""
    added = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = added.get_added_tokens_decoder().items()
    return tuple(sorted(id_ for id_, token in found if token.special))


def _conversations(system: bool) -> Iterator[list[Message]]:
    for number, text in enumerate(_TEXTS):
        later = _TEXTS[number:] + _TEXTS[:number]
        turns = [
            Message(role="assistant" if place % 2 else "user", content=content)
            for place, content in enumerate(later[:5])
        ]
        for length in (1, 3, 5):
            yield turns[:length]
            if system:
                yield [Message(role="system", content=text), *turns[:length]]


def _find(tokenizer: Tokenizer, strip: bool) -> PromptFormat:
    """The strings around probes, which hold for these probes only until they are proved."""

    def around(*texts: str, roles: tuple[str, ...] = _ROLES, answer: bool = False) -> list[str]:
        rest = _render(tokenizer, roles, texts, answer)
        found = []
        for text in texts:
            before, probe, rest = rest.partition(text)
            if not probe:
                raise _Unsayable("the template leaves out or changes a message")
            found.append(before)
        return [*found, rest]

    try:
        first, after_user = around(_USER)
        _, asked = around(_USER, answer=True)
        _, between, after_answer = around(_USER, _ANSWER)
        _, _, again, _ = around(_USER, _ANSWER, _AGAIN)
    except TokenizerError:
        raise _Unsayable("the template refuses a conversation of user and assistant") from None
    user = Around(before=_rest(again, after_answer, "another turn"), after=after_user)
    assistant = Around(before=_rest(between, after_user, "another turn"), after=after_answer)
    begin = _start(first, user, "writes the first turn in another way than later ones")
    system = None
    try:
        task = _render(tokenizer, _TASKED, (_TASK, _USER), False)
        if task != first + _USER + after_user:  # else it is left out
            before, inside, _ = around(_TASK, _USER, roles=_TASKED)
            after = _start(inside, user, "folds the system message into the user's")
            system = Around(before=before, after=after)
    except TokenizerError:
        pass  # it is refused
    return PromptFormat(
        begin=begin, system=system, user=user, assistant=assistant,
        answer=_rest(asked, after_user, "the answer to come"), strip=strip,
    )


def _render(
    tokenizer: Tokenizer, roles: Sequence[str], texts: Sequence[str], answer: bool
) -> str:
    messages = [
        Message(role=role, content=text) for role, text in zip(roles, texts, strict=False)
    ]
    return tokenizer.render(messages, add_generation_prompt=answer)


def _start(text: str, user: Around, fault: str) -> str:
    if not text.endswith(user.before):
        raise _Unsayable(f"the template {fault}")
    return text.removesuffix(user.before)


def _rest(text: str, prefix: str, where: str) -> str:
    if not text.startswith(prefix):
        raise _Unsayable(f"the template ends a message in another way before {where}")
    return text.removeprefix(prefix)
