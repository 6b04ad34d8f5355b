"""The constants of a bundle for glue/android."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cloister.embed.facts import Facts, ModelFile
    from cloister.manifest import Around

__all__ = ["MODEL", "constants", "files"]

MODEL = "model/src/main/assets"  # where the bundle's files go: the assets of a pack
_NOT_JSON = {"$": r"\$", "\f": r"\u000c"}  # what Kotlin's literals write in another way


def files(facts: Facts) -> Sequence[ModelFile]:
    """Return which files of the bundle the app has."""
    return (facts.program, facts.tokenizer)


def constants(facts: Facts) -> Mapping[str, str]:
    """Return what the glue must know of the bundle, as source files by their paths."""
    format_ = facts.format
    checks = ",\n        ".join(
        f"Check({_text(each.prompt)}, {_text(each.answer)}, {each.tokens})"
        for each in facts.checks)
    return {"Model.kt": f"""\
// What the app must know of {facts.name}, written by `cloister embed` of {facts.version}.
package cloister

val MODEL = Model(
    name = {_text(facts.name)},
    executorch = {_text(facts.executorch)},
    program = {_file(facts.program)},
    tokenizer = {_file(facts.tokenizer)},
    context = {facts.context},
    memoryBytes = {facts.memory_bytes}L,
    format = PromptFormat(
        begin = {_text(format_.begin)},
        system = {_around(format_.system) if format_.system else "null"},
        user = {_around(format_.user)},
        assistant = {_around(format_.assistant)},
        answer = {_text(format_.answer)},
        strip = {str(format_.strip).lower()},
    ),
    ends = {_texts(facts.ends)},
    special = {_texts(facts.special)},
    checks = listOf(
        {checks},
    ),
)
"""}


def _text(text: str) -> str:
    """Return the Kotlin literal of `text`, in ASCII."""
    return '"' + "".join(_NOT_JSON.get(each, json.dumps(each)[1:-1]) for each in text) + '"'


def _texts(texts: Iterable[str]) -> str:
    return f"listOf({', '.join(map(_text, texts))})"


def _around(around: Around) -> str:
    return f"Around({_text(around.before)}, {_text(around.after)})"


def _file(file: ModelFile) -> str:
    return f"ModelFile({_text(file.name)}, {_text(file.sha256)}, {file.size_bytes}L)"
