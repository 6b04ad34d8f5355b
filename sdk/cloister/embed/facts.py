"""What an app must know of a bundle."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

import tokenizers

from cloister.backend import CLOISTER
from cloister.errors import EmbedError

if TYPE_CHECKING:
    from pathlib import Path

    from cloister.bundle import Bundle
    from cloister.manifest import PromptFormat

__all__ = ["Check", "Facts", "ModelFile", "facts_of"]

_CHECKS = 2  # answers that an app asks for at its first start
_BACKEND = "xnnpack"


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A file that the app has beside it or fetches, and what it must be."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """A text, and what the model says to it where always the likeliest token is taken."""

    prompt: str = field(repr=False)
    answer: str = field(repr=False)  # without the token that ends it
    tokens: int  # of the answer, that one counted


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the constants of every platform are made from."""

    name: str
    version: str  # of Cloister
    executorch: str  # release that made the program, and runs it
    program: ModelFile
    tokenizer: ModelFile
    context: int  # tokens
    memory_bytes: int  # that loading takes
    format: PromptFormat
    ends: tuple[str, ...]  # texts of the tokens that end an answer
    special: tuple[str, ...]  # texts that the tokenizer reads as control tokens
    checks: tuple[Check, ...]
    source: Path = field(repr=False)  # directory of the bundle


def facts_of(bundle: Bundle) -> Facts:
    """Return what an app must know of a bundle, whose files are hashed first.

    Raises:
        EmbedError: the stock runners cannot do what this bundle needs; it says what.
        BundleCorrupt: see `Bundle.verify`.
    """
    bundle.verify()
    said = bundle.manifest
    entry = next((each for each in said.programs if each.backend == _BACKEND), None)
    if entry is None:
        own = next((each for each in said.programs if each.backend == CLOISTER.name), None)
        raise EmbedError(
            f"The bundle has no program for {_BACKEND}; export it for that backend" + (
                "" if own is None else ", too, or link `cloister_kernels` of operator ABI "
                f"{own.operator_abi} to an app of your own (kernels/README.md)") + ".")
    reason = dict(bundle.receipt().get("phone_tokenizer") or {}).get("reason")  # type: ignore[call-overload]
    if reason:
        raise EmbedError(
            f"ExecuTorch's runners cannot read this model's text ({reason}); embed another model.")
    if said.prompt_format is None:
        raise EmbedError(
            f"This model's conversations cannot be written without Jinja "
            f"({said.prompt_format_reason}); embed another model.")
    plain = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
    plain.no_padding()
    plain.no_truncation()
    texts = {id_: token.content for id_, token in plain.get_added_tokens_decoder().items()}
    ends = tuple(texts.get(id_) or str(plain.id_to_token(id_)) for id_ in said.eos)

    def file(name: str) -> ModelFile:
        found = said.files[name]
        return ModelFile(name=name, sha256=found.sha256, size_bytes=found.size)

    return Facts(
        name=said.name, version=version("cloister"), executorch=said.executorch,
        program=file(entry.file), tokenizer=file("tokenizer.json"), context=said.context,
        memory_bytes=entry.required_bytes(said.shape),
        format=said.prompt_format, ends=ends,
        special=tuple(texts[id_] for id_ in said.special_ids if id_ in texts),
        checks=tuple(_checks(bundle, plain)), source=bundle.path)


def _checks(bundle: Bundle, plain: tokenizers.Tokenizer) -> list[Check]:
    """Return golden rows as texts: those whose texts give their ids back."""
    found = []
    for row in sorted(bundle.golden(), key=lambda each: -each.margin):
        prompt = plain.decode(list(row.prompt), skip_special_tokens=False)
        ended = row.tokens[-1] in bundle.manifest.eos
        answer = plain.decode(
            list(row.tokens[:-1] if ended else row.tokens), skip_special_tokens=False)
        if (tuple(plain.encode(prompt, add_special_tokens=False).ids) == row.prompt
                and answer and "\ufffd" not in answer):
            found.append(Check(prompt=prompt, answer=answer, tokens=len(row.tokens)))
    if not found:
        raise EmbedError(
            "No golden answer of the bundle can be said as text, so an app could not check itself; "
            "export the bundle again.")
    return found[:_CHECKS]  # which no other rounding answers otherwise
