"""Tokenizer, template and special tokens of a GGUF file, as a Hugging Face directory has them.

A file holds the vocabulary and not how a text is cut before it is looked up: that is known by the
name of the vocabulary (`tokenizer.ggml.pre`), for the names below. Another is refused, since a text
that is cut elsewhere becomes other ids.

Sources: llama.cpp's src/llama-vocab.cpp (which flags hold where a file says nothing, the patterns
by name) and the tokenizer.json files of the models that the names stand for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from cloister.errors import CheckpointError, CloisterError, UnsupportedFeature
from cloister.model.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.model.gguf_file import Header

__all__ = ["check", "read"]

_UNDEFINED, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 0, 1, 2, 3, 4, 6  # types of tokens
_MARKER = re.compile(r"<([|\uff5c])\S+\1>")
_ENDS = ("eos", "eot", "eom")
_NAMED = ("bos", "unknown", "padding", "seperator", "cls", "mask", *_ENDS)
_SPACE = "\u2581"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The patterns that cut a text, one after the other, by the name of the vocabulary.
_CUTS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "deepseek-r1-qwen": (_CASED % "",),
    "gpt-2": (_WORDS,),
    "llama-bpe": (_CASED % "{1,3}",),
    "llama-v3": (_CASED % "{1,3}",),
    "llama3": (_CASED % "{1,3}",),
    "qwen2": (_CASED % "",),
    "smaug-bpe": (_CASED % "{1,3}",),
    # Digits one by one, then words. In one pattern: ExecuTorch's tokenizer drops what lies between
    # the matches of a first one.
    "smollm": (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)"
               r"|\s+",),
    "tekken": (_TEKKEN,),
}
_WHOLE_WORDS = ("llama-bpe", "llama-v3", "llama3", "tekken")  # looked up before they are merged
_BEGUN = _WHOLE_WORDS  # with the begin token before a text, unless the file says otherwise
_COMPOSED = ("deepseek-r1-qwen", "qwen2")  # characters composed (NFC) first, as Qwen's own does


def check(file: Header) -> None:
    """Raise unless the vocabulary of `file` is of a kind that `read` knows.

    Raises:
        UnsupportedFeature, CheckpointError: see `read`.
    """
    vocabulary = _Vocabulary(file)
    if vocabulary.model not in ("gpt2", "llama"):
        raise vocabulary.unsupported(
            f"has a vocabulary of the kind {vocabulary.model[:40]!r}, and Cloister reads gpt2 and "
            "llama"
        )
    if vocabulary.model == "gpt2" and vocabulary.pre not in _CUTS:
        raise vocabulary.unsupported(
            f"does not say how its vocabulary cuts a text, or says {vocabulary.pre!r}, which "
            "Cloister does not know"
        )


def read(file: Header) -> Tokens:
    """Make a tokenizer of the metadata of `file`.

    Raises:
        UnsupportedFeature: a kind of vocabulary that is not known.
        CheckpointError: an entry is missing, or the vocabulary and its merges do not match.
    """
    check(file)
    vocabulary = _Vocabulary(file)
    try:
        tokenizer = (_byte_level if vocabulary.model == "gpt2" else _sentencepiece)(vocabulary)
        vocabulary.add_tokens(tokenizer)
    except CloisterError:
        raise
    except Exception as error:  # as the library raises it, for whatever does not match
        raise CheckpointError(
            f"The vocabulary of {file.path.name} cannot be used; convert the model again."
        ) from error
    template = file.metadata.get("tokenizer.chat_template")
    ids = {name: vocabulary.id_of(name) for name in _NAMED}
    spelled = {"unknown": "unk", "padding": "pad", "seperator": "sep"}  # llama.cpp's spelling
    return Tokens(
        tokenizer=tokenizer.to_str(),
        template=template if isinstance(template, str) else None,
        special_tokens={
            f"{spelled.get(name, name)}_token": vocabulary.tokens[id_]
            for name, id_ in ids.items() if id_ is not None and name not in _ENDS[1:]
        },
        bos=ids["bos"],
        eos=tuple(dict.fromkeys(
            id_ for name in _ENDS if (id_ := ids[name]) is not None)),
    )


class _Vocabulary:
    """The entries of a file about tokens, each of the type that it must be."""

    def __init__(self, file: Header) -> None:
        self._file = file
        self.model: str = self._entry("model", str)
        self.tokens: Sequence[str] = self._entry("tokens", list)
        self.types: Sequence[int] = self._entry("token_type", list, [1] * len(self.tokens))
        self.pre: str | None = self._entry("pre", str, "") or None
        self.gemma = str(file.metadata.get("general.architecture")).startswith("gemma")
        if self.gemma:  # tokens of several spaces are written as such
            self.tokens = [
                _SPACE * len(token) if len(token) > 1 and not token.strip(" ") else token
                for token in self.tokens
            ]
        self.ids = {token: id_ for id_, token in enumerate(self.tokens)}
        if len(self.types) != len(self.tokens) or not all(
            isinstance(token, str) for token in self.tokens
        ):
            raise self.malformed("tokens")

    def _entry(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._file.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, kind):
            raise self.malformed(name)
        return value

    def malformed(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"File {self._file.path.name} lacks tokenizer.ggml.{name}, or it is not what it must "
            "be; convert the model again."
        )

    def unsupported(self, what: str) -> UnsupportedFeature:
        return UnsupportedFeature(
            f"{self._file.path.name} {what}; import the model's Hugging Face directory instead."
        )

    def id_of(self, name: str) -> int | None:
        """Return the id of the token with the part `name`, if there is one."""
        id_ = self._file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id_ is None or id_ in (-1, 0xFFFFFFFF):  # as old converters say that there is none
            return None
        if type(id_) is not int or not 0 <= id_ < len(self.tokens):
            raise self.malformed(f"{name}_token_id")
        return id_

    def flag(self, name: str, *, default: bool) -> bool:
        return bool(self._entry(name, bool, default))

    @property
    def merges(self) -> list[tuple[str, str]] | None:
        """The merges of the file, where it has some."""
        lines = self._entry("merges", list, [])
        pairs = [tuple(line.split(" ", 1)) for line in lines if isinstance(line, str)]
        if len(pairs) != len(lines) or not all(len(pair) == 2 for pair in pairs):
            raise self.malformed("merges")
        return [(left, right) for left, right in pairs] or None

    @property
    def implied_merges(self) -> list[tuple[str, str]]:
        """Every pair that makes a token, the token with the best score first.

        Gemma's are in the order of their ids, and its scores are not.
        """
        scores = [-id_ for id_ in range(len(self.tokens))] if self.gemma else self._entry(
            "scores", list)
        if len(scores) != len(self.tokens):
            raise self.malformed("scores")
        found = []
        for token, id_ in self.ids.items():
            if self.types[id_] in (_UNKNOWN, _CONTROL, _BYTE):
                continue
            for cut in range(1, len(token)):
                left, right = self.ids.get(token[:cut]), self.ids.get(token[cut:])
                if left is not None and right is not None:
                    found.append((-scores[id_], left, right))
        return [(self.tokens[left], self.tokens[right]) for _, left, right in sorted(found)]

    def add_tokens(self, tokenizer: Tokenizer) -> None:
        """Add the tokens that are found whole in a text, and those around every text.

        Some converters say of control tokens that they are words, or say nothing; llama.cpp
        overrides it, too. What ends an answer or is spelled as a marker is no word.
        """
        ends = {self.id_of(name) for name in _ENDS}
        types = [
            _CONTROL if kind in (_UNDEFINED, _NORMAL) and (
                _MARKER.fullmatch(token) or (id_ in ends and token.startswith(("<", "["))))
            else kind for id_, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
        ]
        for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
            added = [
                AddedToken(token, normalized=False, special=special)
                for token, each in zip(self.tokens, types, strict=True)
                if each == kind and token.strip(_SPACE)
            ]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
        begins = self.model == "llama" or self.pre in _BEGUN
        around = [
            (name, self.id_of(name) if self.flag(f"add_{name}_token", default=default) else None)
            for name, default in (("bos", begins), ("eos", False))
        ]
        begin, end = ([] if id_ is None else [self.tokens[id_]] for _, id_ in around)
        if begin or end:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*begin, "$A", *end],
                pair=[*begin, "$A", *end, *begin, "$B", *end],
                special_tokens=[(self.tokens[id_], id_) for _, id_ in around if id_ is not None],
            )


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """Byte-level BPE (GPT-2's)."""
    assert vocabulary.pre is not None  # see `check`
    merges = vocabulary.merges
    if merges is None:
        raise vocabulary.malformed("merges")
    tokenizer = Tokenizer(models.BPE(
        vocabulary.ids, merges, ignore_merges=vocabulary.pre in _WHOLE_WORDS))
    if vocabulary.pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _CUTS[vocabulary.pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece's BPE with byte fallback, its merges out of the scores.

    As llama.cpp does, a space is put before every piece of text between two special tokens, where
    the file does not say otherwise; so do the tokenizers of Llama 2 and the first of Mistral.
    """
    prefix = vocabulary.flag("add_space_prefix", default=True)
    unknown = vocabulary.id_of("unknown")
    tokenizer = Tokenizer(models.BPE(
        vocabulary.ids, vocabulary.merges or vocabulary.implied_merges, byte_fallback=True,
        fuse_unk=True, unk_token=None if unknown is None else vocabulary.tokens[unknown],
    ))
    spaces = normalizers.Replace(" ", _SPACE)
    decoded = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoded.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoded)
    return tokenizer
