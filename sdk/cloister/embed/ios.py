"""The constants of a bundle for glue/ios."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cloister.embed.facts import Check, Facts, ModelFile
    from cloister.manifest import Around

__all__ = ["MODEL", "constants", "files"]

MODEL = "model"  # where the bundle's files go


def files(facts: Facts) -> Sequence[ModelFile]:
    """Return which files of the bundle the app has."""
    return (facts.program, facts.tokenizer)


def constants(facts: Facts) -> Mapping[str, str]:
    """Return what the glue must know of the bundle, as source files by their paths."""
    format_ = facts.format
    system = "nil" if format_.system is None else _around(format_.system)
    return {"Sources/CloisterChat/CloisterBundle.swift": f"""\
// Written by `cloister embed` {facts.version}; do not edit.
enum CloisterBundle {{
  static let name = {_text(facts.name)}
  static let executorch = {_text(facts.executorch)}
  static let program = {_file(facts.program)}
  static let tokenizer = {_file(facts.tokenizer)}
  static let context = {facts.context}
  static let memoryBytes = {facts.memory_bytes}
  static let format = PromptFormat(
    begin: {_text(format_.begin)},
    system: {system},
    user: {_around(format_.user)},
    assistant: {_around(format_.assistant)},
    answer: {_text(format_.answer)},
    strip: {str(format_.strip).lower()})
  static let ends: [String] = {_list(map(_text, facts.ends))}
  static let special: [String] = {_list(map(_text, facts.special))}
  static let checks: [Check] = {_list(map(_check, facts.checks))}
}}
"""}


def _text(text: str) -> str:
    """Return a literal that is the same character for character."""
    return '"' + "".join(
        f"\\{char}" if char in '"\\' else char if char.isascii() and char.isprintable()
        else f"\\u{{{ord(char):x}}}" for char in text) + '"'


def _list(items: Iterable[str]) -> str:
    return "[" + "".join(f"\n    {item}," for item in items) + "\n  ]"


def _file(file: ModelFile) -> str:
    return (f"ModelFile(\n    name: {_text(file.name)},\n    sha256: {_text(file.sha256)},\n"
            f"    sizeBytes: {file.size_bytes})")


def _around(around: Around) -> str:
    return f"Around(before: {_text(around.before)}, after: {_text(around.after)})"


def _check(check: Check) -> str:
    return (f"Check(\n      prompt: {_text(check.prompt)},\n      answer: {_text(check.answer)},\n"
            f"      tokens: {check.tokens})")
