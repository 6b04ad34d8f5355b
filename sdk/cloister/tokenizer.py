"""The tokenizer: text to token ids and back, and the chat template. No torch."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import secrets
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cloister.errors import EmptyPrompt, InvalidText, TokenizerError, VocabularyMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from jinja2 import nodes
    from jinja2.parser import Parser

    from cloister.message import Message

__all__ = ["TextStream", "Tokenizer"]

_PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Tokenizer:
    """A `tokenizer.json` and its chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
        self._backend = backend
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
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
        self.renders_tool_calls = "tool_calls" in template
        backend.encode_special_tokens = True  # spelled in a text, they are text
        added = backend.get_added_tokens_decoder()
        self._special = {id_ for id_, token in added.items() if token.special}
        ids = {added[id_].content: id_ for id_ in self._special}
        # Those of one character cannot be told from text, and stay text.
        self._ids = {text: id_ for text, id_ in ids.items() if len(text) > 1}
        spelled = sorted(self._ids, key=len)
        self._spelled = "|".join(map(re.escape, reversed(spelled))) or "(?!)"

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

    @property
    def fingerprint(self) -> str:
        """The sha256 of the definition, the same for tokenizers that give the same ids."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @property
    def definition(self) -> str:
        """The contents of `tokenizer.json`, as JSON."""
        text: str = self._backend.to_str()
        return text

    def split_special(self, text: str) -> list[str | int]:
        """Split `text`, which no user typed, at the special tokens spelled in it, given as ids."""
        return [
            self._ids[piece] if place % 2 else piece
            for place, piece in enumerate(re.split(f"({self._spelled})", text)) if piece
        ]

    def check_vocabulary(self, rows: int) -> None:
        """Raise VocabularyMismatch if an id lies beyond the `rows` of a model's embedding.

        More rows than ids are common: checkpoints pad them.
        """
        if self.vocab_size > rows:
            raise VocabularyMismatch(
                f"The tokenizer has {self.vocab_size} ids and the model {rows} rows; use the "
                "tokenizer that the model was trained with."
            )

    def id_of(self, token: str) -> int | None:
        """Return the id of a special token or vocabulary entry, or None."""
        id_: int | None = self._backend.token_to_id(token)
        return id_

    def encode(self, text: str) -> list[int]:
        """Encode plain text; special tokens spelled in it stay ordinary text.

        Raises:
            EmptyPrompt: no text.
            InvalidText: the text has a lone surrogate, so it is no Unicode text.
        """
        if not text:
            raise EmptyPrompt("The prompt is empty; give it at least one character.")
        _check_unicode(text)
        return self._encode(text)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """Encode a conversation by the chat template, which is given `tools`.

        The ids are those of the template's text, with one exception: special tokens count where
        the template writes them, and a user who types `<|end|>` ends nothing.

        Raises:
            EmptyPrompt: a message is empty; only an answer may be.
            InvalidText: see `encode`; for every message.
            TokenizerError: the template refuses the conversation.
        """
        # Special tokens that were typed are broken by a mark that nobody can guess, which goes
        # once the template's own are found. The rest reaches the template as it is, since
        # templates trim and search it.
        mark = f"[{secrets.randbelow(10**20)}]"
        for message in messages:
            if not message.content and message.role != "assistant":
                raise EmptyPrompt("A message is empty; give it at least one character.")

        def broken(text: str) -> str:
            _check_unicode(text)
            return re.sub(f"(?={self._spelled})(.)", rf"\1{mark}", text, flags=re.DOTALL)

        def laid_out(typed: Callable[[str], str]) -> str:
            return self._render(
                [self._record(message, typed) for message in messages], add_generation_prompt,
                None if tools is None else _texts(list(tools), broken))

        text = laid_out(broken)
        # A content might complete a special token that the template's text begins.
        guarded = laid_out(lambda typed: f"{mark}{broken(typed)}{mark}")
        if re.findall(self._spelled, text) != re.findall(self._spelled, guarded):
            text = guarded
        ids: list[int] = []
        for place, piece in enumerate(re.split(f"({self._spelled})", text)):
            if place % 2:
                ids.append(self._ids[piece])
            else:
                ids += self._encode(piece.replace(mark, ""))
        return ids

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation that no user typed by the chat template.

        Raises:
            TokenizerError: the template refuses the conversation.
        """
        records = [self._record(message, lambda text: text) for message in messages]
        return self._render(records, add_generation_prompt, None)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids`, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """Return a decoder of ids that arrive one by one."""
        return TextStream(self)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _record(self, message: Message, typed: Callable[[str], str]) -> dict[str, object]:
        """Return a message as templates read it, each of its texts mapped by `typed`."""
        record: dict[str, object] = {"role": message.role, "content": typed(message.content)}
        if message.name is not None:
            record["name"] = typed(message.name)
        if message.tool_calls and self.renders_tool_calls:  # in place of their text
            record["content"] = ""
            record["tool_calls"] = [
                {"type": "function", "function": {
                    "name": typed(call.name), "arguments": _texts(call.arguments, typed)}}
                for call in message.tool_calls
            ]
        return record

    def _render(
        self, messages: list[dict[str, object]], add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None,
    ) -> str:
        def known(name: str) -> bool:
            return self.id_of(name) is not None

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else list(tools), documents=None,
                bos_token=next(filter(known, _BEGIN), ""),
                eos_token=next(filter(known, _END), ""),
            )
        except Exception:  # a template is a program, and may fail in any way
            # Not chained: the cause may quote a message.
            raise TokenizerError(
                "The chat template refuses this order of roles; begin with a system or user "
                "message and alternate."
            ) from None


def _texts(value: Any, typed: Callable[[str], str]) -> Any:
    """Map every text in a JSON value by `typed`."""
    if isinstance(value, str):
        return typed(value)
    if isinstance(value, dict):
        return {typed(key): _texts(item, typed) for key, item in value.items()}
    return [_texts(item, typed) for item in value] if isinstance(value, list) else value


_BEGIN = ("<|begin_of_text|>", "<bos>", "<s>")
_END = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<eos>", "</s>", "<|endoftext|>")


class TextStream:
    """The text of ids that arrive one by one, correct where a character spans tokens.

    The texts that `push` and `end` give, joined, are what `Tokenizer.decode` gives for all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending ids' text that were returned already

    def push(self, id_: int) -> str:
        """Return the text that `id_` completes; empty while a character is unfinished."""
        if id_ in self._tokenizer._special:
            return ""
        self._pending.append(id_)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[self._shown:]
        # The fewest last ids that are text by themselves stay, never none: some tokenizers
        # join words, or bytes, by what stood before.
        for start in reversed(range(len(self._pending))):
            rest = self._tokenizer.decode(self._pending[start:])
            if rest and _UNFINISHED not in rest:
                break
        self._pending, self._shown = self._pending[start:], len(rest)
        return new

    def end(self) -> str:
        """Return the rest of the text, unfinished characters as U+FFFD."""
        text = self._tokenizer.decode(self._pending)[self._shown:]
        self._pending, self._shown = [], 0
        return text


_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class _Generation(Extension):
    """`{% generation %}`, by which templates mark answers for training: its body, unchanged."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidText("The prompt is not valid Unicode text; pass it as UTF-8.") from None


def _refuse(_reason: str) -> NoReturn:
    """Refuse a conversation (`raise_exception`); the reason may quote a message and is dropped."""
    raise jinja2.TemplateError


def _now(form: str) -> str:
    """Format the local time (`strftime_now`)."""
    return datetime.datetime.now().strftime(form)
