"""Text to token ids and back, and the chat template. No torch."""

from __future__ import annotations

import datetime
import json
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cloister.errors import EmptyPrompt, InvalidText, TokenizerError, VocabularyMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Message", "TextStream", "Tokenizer"]

_PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. Its repr does not show what was said."""

    role: str  # system, user or assistant
    content: str

    def __repr__(self) -> str:
        return f"Message(role={self.role!r})"


class Tokenizer:
    """A `tokenizer.json` and its chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
        self._backend = backend
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        environment.filters["tojson"] = lambda value, **kw: json.dumps(
            value, ensure_ascii=False, **kw
        )
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError:
            raise TokenizerError("The chat template is not valid Jinja; correct it.") from None
        special = backend.get_added_tokens_decoder()
        self._special = {id_ for id_, token in special.items() if token.special}

    @classmethod
    def from_files(cls, tokenizer_json: Path, chat_template: Path | None) -> Tokenizer:
        """Read a tokenizer and, where there is one, its chat template.

        Without a template a conversation is `role: content` lines.

        Raises:
            TokenizerError: a file is missing or malformed.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(tokenizer_json))
            template = _PLAIN if chat_template is None else chat_template.read_text("utf-8")
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"{tokenizer_json.name} or its chat template cannot be read; copy the bundle or "
                "checkpoint again."
            ) from error
        if backend.get_vocab_size() == 0:
            raise TokenizerError(f"{tokenizer_json.name} has no vocabulary; copy it again.")
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, template)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def check_vocabulary(self, rows: int) -> None:
        """Refuse a tokenizer with ids beyond the `rows` of a model's embedding.

        More rows than ids are common: checkpoints pad them.

        Raises:
            VocabularyMismatch: with both numbers.
        """
        if self.vocab_size > rows:
            raise VocabularyMismatch(
                f"The tokenizer has {self.vocab_size} ids and the model {rows} rows; use the "
                "tokenizer that the model was trained with."
            )

    def id_of(self, token: str) -> int | None:
        """The id of a special token or vocabulary entry."""
        id_: int | None = self._backend.token_to_id(token)
        return id_

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens spelled in it stay ordinary text.

        Raises:
            EmptyPrompt: no text.
            InvalidText: the text has a lone surrogate, so it is no Unicode text.
        """
        if not text:
            raise EmptyPrompt("The prompt is empty; give it at least one character.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidText(
                "The prompt is not valid Unicode text; pass it as UTF-8."
            ) from None
        return self._encode(text, special=False)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation as the chat template lays it out.

        What was said is encoded as plain text: a user who types `<|end|>` ends nothing.

        Raises:
            EmptyPrompt, InvalidText: see `encode`; for every message.
            TokenizerError: the template refuses the conversation.
        """
        # Rendered around marks that nobody can guess; then the template's own text is encoded
        # with its special tokens, and each content without.
        salt = secrets.token_hex(8)
        marks = {f"\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}{salt}-{i}-": message.content
                 for i, message in enumerate(messages)}
        for message in messages:
            self.encode(message.content)
        laid_out = self._render(
            [(message.role, mark) for message, mark in zip(messages, marks, strict=True)],
            add_generation_prompt,
        )
        ids: list[int] = []
        pattern = "|".join(re.escape(mark) for mark in marks)
        pieces = re.split(f"({pattern})", laid_out) if marks else [laid_out]
        for piece in pieces:
            if piece in marks:
                ids += self._encode(marks[piece], special=False)
            elif piece:
                ids += self._encode(piece, special=True)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A decoder of ids that arrive one by one."""
        return TextStream(self)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        self._backend.encode_special_tokens = not special
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _render(self, turns: list[tuple[str, str]], add_generation_prompt: bool) -> str:
        def text(name: str) -> str:
            return name if self.id_of(name) is not None else ""

        try:
            return self._template.render(
                messages=[{"role": role, "content": content} for role, content in turns],
                add_generation_prompt=add_generation_prompt,
                bos_token=next(filter(text, _BEGIN), ""),
                eos_token=next(filter(text, _END), ""),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError):
            raise TokenizerError(
                "The chat template refuses this order of roles; begin with a system or user "
                "message and alternate."
            ) from None


_BEGIN = ("<|begin_of_text|>", "<bos>", "<s>")
_END = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<eos>", "</s>", "<|endoftext|>")


class TextStream:
    """Text of ids that arrive one by one, correct where a character spans tokens.

    The texts that `push` and `end` give, joined, are what `Tokenizer.decode` gives for all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []
        self._shown = 0  # characters of the held ids' text that were given already

    def push(self, id_: int) -> str:
        """The text that `id_` completes; empty while a character is unfinished."""
        if id_ in self._tokenizer._special:
            return ""
        self._held.append(id_)
        text = self._tokenizer.decode(self._held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < _LONGEST:
            return ""
        new = text[self._shown:]
        # The last token is kept, since some tokenizers join words by what stood before.
        self._held = self._held[-1:]
        self._shown = len(self._tokenizer.decode(self._held))
        return new

    def end(self) -> str:
        """What is left, unfinished characters as U+FFFD."""
        text = self._tokenizer.decode(self._held)[self._shown:]
        self._held, self._shown = [], 0
        return text


_LONGEST = 8  # held tokens; a character has at most 4 bytes, so at most 4 unfinished tokens


def _refuse(_reason: str)  -> NoReturn:
    """What templates call `raise_exception`; the reason may quote a message and is dropped."""
    raise jinja2.TemplateError


def _now(form: str) -> str:
    """What templates call `strftime_now`: the local time, as they mean it."""
    return datetime.datetime.now().strftime(form)
