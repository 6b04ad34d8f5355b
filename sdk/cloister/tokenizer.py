"""The tokenizer: text to token ids and back, and the chat template. No torch."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from functools import cached_property
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Protocol

import tokenizers

from cloister.errors import EmptyPrompt, InvalidText, TokenizerError, VocabularyMismatch
from cloister.message import Message
from cloister.pieces import MEDIA, MediaFormats
from cloister.placeholders import Placeholders
from cloister.template import Template, map_texts
from cloister.text_stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Named", "Tokenizer"]

# Without a template: as the model was trained to begin, then a line a turn.
_PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_TASK = Message(role="system", content="Probed task")
_USER = Message(role="user", content="Probed question")
_REPLY = Message(role="assistant", content="Probed reply")


class Named(Protocol):
    """What a manifest or a checkpoint's metadata says of what the model reads."""

    @property
    def bos(self) -> int | None:
        """The token that begins a text."""

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end an answer."""

    @property
    def special_tokens(self) -> Mapping[str, str] | None:
        """Tokens by the names that templates use, such as `bos_token`; None where not stored."""

    @property
    def media(self) -> MediaFormats | None:
        """Pictures and recordings; None where it reads text only."""


class Tokenizer:
    """A `tokenizer.json` and its chat template.

    Control tokens are the special ones, those of `eos`, and any other added token that the
    template writes, or `media` has around a picture or recording. Only the template writes them:
    what a user types stays text. Those of one character cannot be told from text, and count
    wherever they stand.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, template: str | None, *,
        special_tokens: Mapping[str, str] | None = None, eos: Collection[int] = (),
        media: MediaFormats | None = None,
    ) -> None:
        self._backend, self._eos, self._media = backend, tuple(eos), media or MediaFormats()
        self._named = dict(special_tokens or {})
        self._template = Template(_PLAIN if template is None else template)
        self.renders_tool_calls = template is not None and "tool_calls" in template
        backend.encode_special_tokens = False
        backend.no_padding()
        backend.no_truncation()
        self._added = {
            id_: token.content for id_, token in backend.get_added_tokens_decoder().items()
        }
        self._special = {
            id_ for id_, token in backend.get_added_tokens_decoder().items()
            if token.special or id_ in self._eos
        }
        self._plain = template is None
        self._begin = self._first_ids() if self._plain else []
        self._ids = {self._added[id_]: id_ for id_ in self._special if len(self._added[id_]) > 1}
        self._spelled = _any_of(self._ids)

    @classmethod
    def from_files(
        cls, tokenizer_json: Path, chat_template: Path | None, named: Named | None = None
    ) -> Tokenizer:
        """Read a tokenizer and, where there is one, its chat template.

        `named` are the model's tokens, and what it takes besides text. Without a template a
        conversation is `role: content` lines.

        Raises:
            TokenizerError: a file is missing or malformed.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(tokenizer_json))
            template = None if chat_template is None else chat_template.read_text("utf-8")
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"{tokenizer_json.name} or its chat template cannot be read; copy the bundle or "
                "checkpoint again."
            ) from error
        if backend.get_vocab_size() == 0:
            raise TokenizerError(f"{tokenizer_json.name} has no vocabulary; copy it again.")
        if named is None:
            return cls(backend, template)
        tokens = named.special_tokens
        if tokens is None:  # written by a release that did not store them
            ids = {"bos_token": named.bos, "eos_token": next(iter(named.eos), None)}
            tokens = {
                name: token for name, id_ in ids.items()
                if id_ is not None and (token := backend.id_to_token(id_)) is not None
            }
        return cls(backend, template, special_tokens=tokens, eos=named.eos, media=named.media)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Tokens by the names that the template is given, such as `bos_token`."""
        return dict(self._named)

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

    def token_of(self, id_: int) -> str:
        """Return the text of a token as the vocabulary spells it; empty where there is none."""
        return self._added.get(id_) or self._backend.id_to_token(id_) or ""

    def encode(self, text: str) -> list[int]:
        """Encode plain text; control tokens spelled in it stay ordinary text.

        Raises:
            EmptyPrompt: no text.
            InvalidText: the text has a lone surrogate, so it is no Unicode text.
        """
        if not text:
            raise EmptyPrompt("The prompt is empty; give it at least one character.")
        _check_unicode(text)
        ids: list[int] = _encoding(self._backend, text).ids
        if self._control.isdisjoint(ids):
            return ids
        mark = _mark()
        return self._text_ids(self._broken(text, self._controls, mark), mark, first=True)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """Encode a conversation by the chat template, which is given `tools`.

        The ids are those of the template's text as a whole, with one exception: control tokens
        count where the template writes them, and a user who types `<|end|>` ends nothing. Each
        vector of a picture or recording is MEDIA, in the order of the messages.

        Raises:
            EmptyPrompt: a message is empty; only an answer may be.
            InvalidText: see `encode`; for every message.
            UnsupportedMedia: a picture or recording that the model does not take, or that was not
                decoded for it.
            MediaTooLarge: a recording that is longer than the model takes.
            TokenizerError: the template refuses the conversation, or leaves media out.
        """
        # Control tokens that were typed are broken by a mark that nobody can guess, which goes
        # once the template's own are found. The rest reaches the template as it is, since
        # templates trim and search it.
        mark, typed = _mark(), list[str]()
        for message in messages:
            if not (message.text or message.media) and message.role != "assistant":
                raise EmptyPrompt("A message is empty; give it at least one character.")
        places = Placeholders(
            [part for message in messages for part in message.media], self._media, mark=mark,
            lists=self._reads[1])

        def broken(text: str, role: str) -> str:
            _check_unicode(text)
            typed.append(text)
            # An answer is the model's own: of the tokens that are not flagged special it may hold
            # some (<think>), but none that the template writes around turns.
            spelled = self._turns if role == "assistant" else self._controls
            return self._broken(text, spelled, mark)

        def laid_out(change: Callable[[str, str], str]) -> str:
            places.restart()
            return self._render(
                [self._record(message, change, places) for message in messages],
                add_generation_prompt,
                None if tools is None else [
                    map_texts(tool, lambda text: broken(text, "tool")) for tool in tools])

        text = laid_out(broken)
        # A content might complete a control token that the template's text begins.
        if any(map(self._may_complete, typed)):
            guarded = laid_out(lambda text, role: f"{mark}{broken(text, role)}{mark}")
            if re.findall(self._controls, text) != re.findall(self._controls, guarded):
                text = guarded
        text, vectors = places.fill(text, self._stand_in)
        return [*self._begin, *self._with_vectors(text, vectors, mark)]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation that no user typed by the chat template.

        Raises:
            TokenizerError: the template refuses the conversation.
        """
        records = [self._record(message, lambda text, role: text) for message in messages]
        begin = "".join(self._backend.id_to_token(id_) or "" for id_ in self._begin)
        return begin + self._render(records, add_generation_prompt, None)

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template lays out a system message, and neither refuses nor drops it."""
        probes = [self._record(message, lambda text, role: text) for message in (_TASK, _USER)]
        try:
            return _TASK.text in self._lay_out(probes, True, None)
        except TokenizerError:
            return False

    @cached_property
    def turn_end(self) -> int | None:
        """The token that the template writes after an answer; without one, the first that ends it.

        None where the model's files name none.
        """
        try:
            written = self.render([_USER, _REPLY], add_generation_prompt=False)
        except TokenizerError:
            written = ""
        after = written.rpartition(_REPLY.text)[2].lstrip()
        found = re.match(_any_of(self._added.values()), after)
        if found and len(found[0]) > 1:
            return self.id_of(found[0])
        named = self.id_of(self._named.get("eos_token", ""))
        return named if named in self._eos else next(iter(self._eos), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode `ids`, special tokens left out."""
        shown = [id_ for id_ in ids if id_ not in self._special]
        text: str = self._backend.decode(shown, skip_special_tokens=True)
        return text

    def stream(self, *, answer: bool = False) -> TextStream:
        """Return a decoder of ids that arrive one by one.

        With `answer` they follow a prompt of `encode_chat`: without a template an answer begins
        with the space that the layout puts before it, and which is no part of it.
        """
        return TextStream(
            self.decode, self._special, lead=" " if answer and self._plain else "")

    def _first_ids(self) -> list[int]:
        """Ids that the tokenizer puts before every text: how the model was trained to begin."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [id_ for id_, _ in takewhile(lambda pair: pair[1], marked)]

    @cached_property
    def _reads(self) -> tuple[bool, bool]:
        return self._template.reads(self._named)

    @cached_property
    def _stand_in(self) -> str:
        """A special token in place of vectors: it parts a text as a picture's own token does."""
        for id_, token in self._backend.get_added_tokens_decoder().items():
            bound = token.lstrip or token.rstrip or token.single_word or token.normalized
            if id_ in self._special and len(token.content.strip()) > 1 and not bound:
                return token.content
        return ""

    def _with_vectors(self, text: str, vectors: Mapping[int, int], mark: str) -> list[int]:
        """Encode what the template wrote; `vectors` are the numbers of them by their place."""
        encoding = _encoding(self._backend, text)
        marked, ids, end, found = mark in text, list[int](), 0, 0
        for id_, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            stands = start in vectors and self._added.get(id_) == self._stand_in
            found += stands
            if not marked:
                ids += [MEDIA] * vectors[start] if stands else [id_]
            elif id_ in self._control and start >= end:
                ids += self._text_ids(text[end:start], mark, first=end == 0)
                ids += [MEDIA] * vectors[start] if stands else [id_]
                end = stop
        if found != len(vectors):
            raise TokenizerError(
                "The tokenizer cannot tell a picture or recording from the text beside it; give it "
                "a special token.")
        return ids + self._text_ids(text[end:], mark, first=end == 0) if marked else ids

    @cached_property
    def _turns(self) -> str:
        """A pattern of the control tokens that stand around turns: no answer holds one."""
        laid_out = [[_USER], [_USER, _REPLY, _USER], [_TASK, _USER]]
        around = dict.fromkeys([*self._ids, *self._media.markers])
        for messages in laid_out:
            try:
                written = self.render(messages, add_generation_prompt=False)
            except TokenizerError:
                continue
            around |= dict.fromkeys(re.findall(_any_of(self._added.values()), written))
        # Runs of white space (Gemma has tokens for them) are text, which templates trim.
        return _any_of(token for token in around if len(token) > 1 and not token.isspace())

    @cached_property
    def _controls(self) -> str:
        """A pattern of the control tokens."""
        return _any_of(self._inner)

    @cached_property
    def _inner(self) -> tuple[str, ...]:
        around = re.compile(self._turns)
        media = self._media.markers
        written = "\0".join([self._template.literals, *self._media.texts])
        return *media, *(
            token for id_, token in self._added.items() if len(token) > 1 and not token.isspace()
            and token not in media
            and (id_ in self._special or token in written or around.fullmatch(token))
        )

    @cached_property
    def _control(self) -> frozenset[int]:
        tokens = set(self._inner)
        return frozenset(id_ for id_, token in self._added.items() if token in tokens)

    @cached_property
    def _parts(self) -> frozenset[str]:
        """Where control tokens may be cut in two: what can begin or end one."""
        return frozenset(
            part for token in self._inner for cut in range(1, len(token))
            for part in (token[:cut], token[cut:])
        )

    def _may_complete(self, text: str) -> bool:
        """Whether `text` may make a control token together with what stands around it."""
        said, longest = text.strip(), max(map(len, self._inner), default=0)
        return any(said in token for token in self._inner) or any(
            said[:size] in self._parts or said[-size:] in self._parts
            for size in range(1, min(longest, len(said)))
        )

    @cached_property
    def _as_text(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Encoders to which control tokens are text: of a text's begin, and of what follows it."""
        definition = json.loads(self.definition)
        for token in definition["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self._control
        first = json.dumps(definition)
        # Where Metaspace puts a space before the first word alone, no other piece gets one.
        rest = re.sub(r'("prepend_scheme": )"first"', r'\1"never"', first)
        both = tokenizers.Tokenizer.from_str(first), tokenizers.Tokenizer.from_str(rest)
        for encoder in both:
            encoder.encode_special_tokens = True
        return both

    def _text_ids(self, text: str, mark: str, *, first: bool) -> list[int]:
        """Encode `text`, in which a mark breaks control tokens, as text without the marks."""
        whole = text.replace(mark, "")
        ids: list[int] = _encoding(self._as_text[not first], whole).ids if whole else []
        if self._control.isdisjoint(ids):
            return ids
        # Some vocabularies have control tokens among their words: they stay broken.
        ids = []
        for piece in filter(None, text.split(mark)):
            ids += _encoding(self._as_text[not first], piece).ids
            first = False
        return ids

    @cached_property
    def _folds(self) -> bool:
        """Whether a text that spells no control token may become one when it is normalized."""
        added = self._backend.get_added_tokens_decoder()
        return self._backend.normalizer is not None and any(
            added[id_].normalized for id_ in self._control
        )

    def _broken(self, text: str, spelled: str, mark: str) -> str:
        """Put `mark` behind the first character of each control token in `text`."""
        places = {match.start() + 1 for match in re.finditer(f"(?={spelled})", text)}
        if self._folds:
            encoding = _encoding(self._backend, text)
            for id_, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if id_ in self._control and re.search(spelled, self._added[id_]):
                    piece = text[start:stop]
                    places.add(stop - len(piece.lstrip()) + 1)
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[start:stop] for start, stop in pairwise(cuts))

    def _record(
        self, message: Message, typed: Callable[[str, str], str],
        places: Placeholders | None = None,
    ) -> dict[str, object]:
        """Return a message as templates read it, each of its texts mapped by `typed`."""
        def change(text: str) -> str:
            return typed(text, message.role)

        content = change(message.text) if places is None else places.content(
            message.content, change)
        if isinstance(content, str) and self._reads == (False, True):
            content = [{"type": "text", "text": content}]
        record: dict[str, object] = {"role": message.role, "content": content}
        if message.name is not None:
            record["name"] = change(message.name)
        if message.tool_calls and self.renders_tool_calls:  # in place of their text
            record["content"] = ""
            record["tool_calls"] = [
                {"type": "function", "function": {
                    "name": change(call.name), "arguments": map_texts(call.arguments, change)}}
                for call in message.tool_calls
            ]
        return record

    def _render(
        self, messages: list[dict[str, object]], add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None,
    ) -> str:
        try:
            return self._lay_out(messages, add_generation_prompt, tools)
        except TokenizerError as error:
            if messages[0]["role"] != "system" or self.has_system_role:
                raise
            reason = str(error).rpartition("; ")[0]
        raise TokenizerError(
            f"{reason}; it has no system role: put the instruction into the user's message."
        )

    def _lay_out(
        self, messages: list[dict[str, object]], add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None,
    ) -> str:
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools,
            special_tokens=self._named)


def _encoding(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        return backend.encode(text, add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library, and no Exception
            raise
    raise TokenizerError(
        "The tokenizer cannot read this text: added tokens with lstrip and rstrip stand too close."
    )


def _mark() -> str:
    return f"[{secrets.randbelow(10**20)}]"


def _any_of(tokens: Iterable[str]) -> str:
    """Return a pattern of any of `tokens`, the longest first."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidText("The prompt is not valid Unicode text; pass it as UTF-8.") from None
