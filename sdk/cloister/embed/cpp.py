"""The constants of a bundle for glue/cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cloister.embed.facts import Facts, ModelFile
    from cloister.manifest import Around

__all__ = ["MODEL", "constants", "files"]

MODEL = "model"  # where the bundle's files go


def files(facts: Facts) -> Sequence[ModelFile]:
    """Return which files of the bundle the app has."""
    return (facts.program, facts.tokenizer)


def constants(facts: Facts) -> Mapping[str, str]:
    """Return what the glue must know of the bundle, as source files by their paths."""
    said = facts.format
    rows = (
        ("name", _text(facts.name)), ("executorch", _text(facts.executorch)),
        ("program", _file(facts.program)), ("tokenizer", _file(facts.tokenizer)),
        ("context", str(facts.context)), ("memory_bytes", f"{facts.memory_bytes}u"),
        ("begin", _text(said.begin)),
        ("system", "std::nullopt" if said.system is None else _around(said.system)),
        ("user", _around(said.user)), ("assistant", _around(said.assistant)),
        ("answer", _text(said.answer)), ("strip", str(said.strip).lower()),
        ("ends", _list(map(_text, facts.ends))), ("special", _list(map(_text, facts.special))),
        ("checks", _list(f"{{{_text(each.prompt)}, {_text(each.answer)}, {each.tokens}}}"
                         for each in facts.checks)),
    )
    lines = "".join(f"      /* {name} */ {value},\n" for name, value in rows)
    return {"bundle.h": (
        f"// Written by `cloister embed` {facts.version}: write it anew rather than change it.\n"
        '#pragma once\n\n#include "cloister.h"\n\nnamespace cloister {\n\n'
        "inline const Bundle& bundle() {\n  using namespace std::string_literals;\n"
        f"  static const Bundle it{{\n{lines}  }};\n  return it;\n}}\n\n"
        "}  // namespace cloister\n")}


def _text(text: str) -> str:
    """Return a literal of std::string; bytes are octal, which ends after three digits."""
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F) if chr(byte) not in '"\\?'}
    return '"' + "".join(plain.get(byte, f"\\{byte:03o}") for byte in text.encode()) + '"s'


def _file(file: ModelFile) -> str:
    return f"{{{_text(file.name)}, {_text(file.sha256)}, {file.size_bytes}u}}"


def _around(around: Around) -> str:
    return f"Around{{{_text(around.before)}, {_text(around.after)}}}"


def _list(values: Iterable[str]) -> str:
    return f"{{{', '.join(values)}}}"
