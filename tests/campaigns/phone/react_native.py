"""The glue for React Native: compiled against the package's types, run by Node on stock C++."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.phone import old_export, templates
from tests.phone.react_native_glue import (
    RELEASE,
    built,
    bytecode,
    golden,
    missing,
    results,
    type_errors,
    written,
)

from cloister.bundle import Bundle

PACKAGE = f"react-native-executorch {RELEASE}"
WHERE = "the glue for React Native in Node, stock runner behind a stand-in"
VERSIONS = {"react-native-executorch": RELEASE, "trl's templates": "1.16.0"}
REFUSED = ("special", "specialSystem", "noSystem", "changedByte", "missing", "memory",
           "wrongGolden", "hot", "failed")


def rows(bundles: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    """Yield what, where, result and how."""
    if lacking := missing():
        yield "answers by the glue", WHERE, f"not run: {lacking}", "run"
        return
    opened = [Bundle.open(path) for path in bundles]
    with tempfile.TemporaryDirectory() as work:
        app = written(Path(work, "glue"), opened[0])
        yield "it compiles", f"{PACKAGE}, its own types", type_errors(app) or "yes", "compiled"
        built(app, Path(work, "built"))
        yield "it is built as an app is", "React Native's Babel preset, worklets' plugin, Hermes", (
            ", ".join(bytecode(Path(work, "built"))) or "yes"), "compiled"
        chat = app / "src" / "chat.ts"
        chat.write_text(chat.read_text().replace("maxNewTokens: limit", "maxTokens: limit"))
        wrong = type_errors(app).splitlines()
        yield "a field that the package lacks", f"{PACKAGE}, its own types", (
            wrong[0] if wrong else "not found"), "compiled"
        yield "golden answers of an old export", WHERE, _old(Path(work)), "run"
    for bundle in opened:
        yield from _answers(bundle)
    for name, (_, equal, told, rightly) in templates.agreement(opened[0]).items():
        all_of = len(templates.CONVERSATIONS)
        yield (f"conversations by the template {name}", "@huggingface/jinja against ours",
               f"{equal} of {all_of}; by our strings {rightly} of {told}", "run")
    yield "src/useChat.ts", PACKAGE, "see: it compiles", "compiled"
    yield ("the glue on a device", "iOS, Android",
           "steps and expected output: glue/react-native/README.md", "written")


def _answers(bundle: Bundle) -> Iterator[tuple[str, str, str, str]]:
    asked = golden(bundle)
    with tempfile.TemporaryDirectory() as work:
        app = written(Path(work, "glue"), bundle)
        try:
            came = results(app, asked)
        except ChildProcessError as error:
            yield f"answers, {bundle.manifest.name}", WHERE, str(error)[:200], "run"
            return
    right = sum(heard["text"] == row.answer or (heard["lost"] and _alike(heard, row.answer))
                for heard, row in zip(came["golden"], asked, strict=True))
    name = bundle.manifest.name
    yield f"golden answers, {name}", WHERE, f"{right} of {len(bundle.golden())}", "run"
    for what, result in _results(came):
        yield f"{what}, {name}", WHERE, result, "run"


def _alike(heard: Mapping[str, Any], answer: str) -> bool:
    """Whether the answer has every part that was heard, in this order."""
    for part in heard["text"].split("\ufffd"):
        _, found, answer = answer.partition(part)
        if part and not found:
            return False
    return True


def _results(came: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    full = came["full"]
    yield f"a conversation past {full['context']} tokens", (
        f"\"{full['again']['ending']}\" after {full['turns']} turns; after a reset, answers"
        if full["anew"]["text"] else "no answer after a reset")
    yield "a prompt longer than the context", full["long"]["ending"]
    if lost := came["split"]["lost"]:
        yield "split characters", f"{lost} pieces lost, each told"
    yield "stopped in the middle, before it began, by closing", ", ".join(
        came[case]["ending"] for case in ("stopped", "stoppedAtOnce", "closedInTheMiddle"))
    yield "asked twice at once", came["twice"]["second"]
    yield "refused by name", ", ".join(came[case]["refused"] for case in REFUSED)


def _old(work: Path) -> str:
    bundle = old_export.bundle(work)
    if bundle is None:
        return "not run: this checkout has no history"
    try:
        came = results(written(work / "old", bundle), golden(bundle))
    except ChildProcessError as error:
        return str(error).splitlines()[0][:80]
    return str(came["golden"])[:80]
