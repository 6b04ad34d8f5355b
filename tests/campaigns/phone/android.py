"""The glue for Android: run on the JVM, and compiled against ExecuTorch's own Kotlin source."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.phone import kotlin_glue
from tests.phone.kotlin_glue import Trial

from cloister.bundle import Bundle
from cloister.embed.write import embed

WHERE = "the glue for Android on the JVM, stock runner behind a stand-in for LlmModule"
SOURCE = "extension/android/executorch_android/src/main/java"
REAL = "the glue for Android, Kotlin source of ExecuTorch's archive"
VERSIONS = {"kotlin-compiler": kotlin_glue.PACKAGE.partition("@")[2],
            "kotlinx-coroutines": "1.8.0"}

# What that source takes of other libraries.
STUBS = {
    "Jni": """package com.facebook.jni
class HybridData {
  val isValid = true
  fun resetNative() {}
}""",
    "Annotations": "package com.facebook.jni.annotations\nannotation class DoNotStrip",
    "Loader": """package com.facebook.soloader.nativeloader
class SystemDelegate
object NativeLoader {
  fun isInitialized() = true
  fun init(delegate: SystemDelegate) {}
  fun loadLibrary(name: String) = true
}""",
    "Log": "package android.util\nobject Log { fun e(tag: String, text: String) = 0 }",
}


def rows(bundles: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    if lacking := kotlin_glue.missing():
        yield "answers by the glue", WHERE, f"not run: this machine lacks {lacking}", "run"
        return
    yield "it compiles", f"{REAL} 1.4.1", _compiled(bundles[0]), "compiled"
    for path in bundles:
        bundle = Bundle.open(path)
        name = bundle.manifest.name
        if kotlin_glue.asked(bundle) is None:
            yield (f"answers by the glue, {name}", WHERE, "not run: no golden answer of it answers "
                   "a text and begins with two tokens of its own", "run")
            continue
        with tempfile.TemporaryDirectory() as work:
            began = time.perf_counter()
            found = kotlin_glue.trial(bundle, Path(work))
            took_s = time.perf_counter() - began
        for what, result in _results(found):
            yield f"{what}, {name}", WHERE, result, "run"
        yield f"from the bundle to all of these, {name}", WHERE, f"{took_s:.0f} s", "run"
    yield "the build files", "Gradle, Android", "-", "written"
    yield ("the glue on a device", "Android",
           "steps and expected output: glue/android/README.md", "written")


def _results(found: Trial) -> Iterator[tuple[str, str]]:
    yield "scenarios that failed", str(sum("error" in each for each in found.values()))
    pieces = found["streams"]["pieces"].split("|")
    text, golden = "".join(pieces), found["golden"]["answer"]  # which may be cut
    same = golden.startswith(text) or text.startswith(golden)
    yield ("a golden answer, streamed, without the end token",
           f"{'the same' if same else 'another'}, in {len(pieces)} pieces")
    turns = [each for each in found.values() if "whole" in each]
    read = sum(each["read"] == "true" for each in turns)
    yield "second turns before which just the conversation was read", f"{read} of {len(turns)}"
    alike = sum(each["whole"].startswith(each["second"]) for each in turns)
    yield ("second answers as where one call reads it all (which rounds in another way)",
           f"{alike} of {len(turns)}")
    yield "a character of two tokens", found["split"]["pieces"].split("|")[0]
    yield "stopped, and asked again", f"{found['stops']['end']}, {found['stops']['next']}"
    yield "asked twice at once", found["twice"]["say"].partition(":")[0]
    if fills := found.get("fills"):
        yield "a text longer than the context", fills["first"].partition(":")[0]
        yield "an answer, and a turn, past it", f"{fills['end-middle']}, {fills['end-turn']}"
    yield "refused by name", ", ".join(sorted(
        f"{name}: {text.partition(':')[0]}" for name, text in found["refuses"].items()
        if name != "text"))
    yield "files copied from assets, picked, from a pack (Android's classes are stand-ins)", (
        found["copies"]["files"])


def _compiled(path: Path) -> str:
    source = Path(os.environ.get("TEST_EXECUTORCH", "/nowhere"), SOURCE)
    if not source.is_dir():
        return "not run: TEST_EXECUTORCH must name a checkout of ExecuTorch's v1.4.1"
    with tempfile.TemporaryDirectory() as work:
        embed(Bundle.open(path), "android", Path(work, "app"))
        for name, text in STUBS.items():
            Path(work, f"{name}.kt").write_text(text)
        theirs = [each for each in source.rglob("*.kt") if not {"asr", "training"} & {*each.parts}]
        kotlin_glue.compile_kotlin(
            [*Path(work).rglob("*.kt"), *theirs, *kotlin_glue.TRIAL.glob("A*.kt")],
            Path(work, "classes"))
    return "yes"
