"""Kotlin's compiler, and the glue for Android run with it on the JVM."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from base64 import b64decode
from collections import defaultdict
from pathlib import Path

from cloister.bundle import Bundle
from cloister.embed.write import embed

__all__ = ["Trial", "compiler", "compile_kotlin", "missing", "trial"]

HERE = Path(__file__).parent
TRIAL = HERE / "kotlin"
ROW = 0  # of golden.jsonl: what a trial asks
Trial = dict[str, dict[str, str]]  # by scenario and name


def missing() -> str | None:
    """Return what is not here of what the glue's trial needs."""
    if shutil.which("java") is None:
        return "no Java: apt-get install openjdk-17-jdk-headless"
    if compiler() is None:
        return "no Kotlin: TEST_KOTLIN must name an unpacked npm package kotlin-compiler"
    return None


def compiler() -> Path | None:
    """Return the libraries of npm's kotlin-compiler, among which is kotlinx.coroutines."""
    path = Path(os.environ.get("TEST_KOTLIN", "/nowhere"), "lib")
    return path if (path / "kotlin-compiler.jar").exists() else None


def compile_kotlin(sources: list[Path], out: Path) -> None:
    """Compile Kotlin `sources` into the directory `out`.

    Raises:
        RuntimeError: it does not compile; it says where.
    """
    lib = compiler()
    assert lib is not None
    done = subprocess.run([
        "java", "-Xmx1500m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
        "-cp", str(lib / "kotlin-preloader.jar"), "org.jetbrains.kotlin.preloading.Preloader",
        "-cp", str(lib / "kotlin-compiler.jar"), "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
        "-no-stdlib", "-no-reflect", "-jvm-target", "11", "-classpath", _libraries(),
        "-d", str(out), *map(str, sources)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])


def trial(bundle: Bundle, scratch: Path) -> Trial:
    """Return what tests/phone/kotlin/Trial.kt prints about the glue with `bundle`."""
    out, split = scratch / "app", scratch / "split"
    facts = embed(bundle, "android", out)
    model = out / "model/src/main/assets"
    shutil.copytree(model, split)
    tokenizer = split_characters(split / "tokenizer.json", bundle)
    compile_kotlin([*out.glob("*.kt"), *TRIAL.glob("*.kt")], scratch / "classes")
    ask = _asked(bundle).removeprefix(facts.format.user.before)
    properties = {
        "model": model, "split": split, "scratch": scratch, "splitSha256": tokenizer,
        "runner": f"{sys.executable} -P -m tests.phone.runner",
        "ask": ask.removesuffix(facts.format.user.after + facts.format.answer)}
    done = subprocess.run(
        ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
         *(f"-D{name}={value}" for name, value in properties.items()),
         "-cp", f"{scratch / 'classes'}:{_libraries()}", "cloister.TrialKt"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))})
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found: Trial = defaultdict(dict)
    for line in done.stdout.splitlines():
        scenario, name, value = line.split(" ")
        found[scenario][name] = b64decode(value).decode()
    return found


def split_characters(path: Path, bundle: Bundle) -> str:
    """Change the tokenizer so that the golden answer's first two tokens are the halves of an é.

    Return its new sha256.
    """
    record = json.loads(path.read_text("utf-8"))
    vocabulary = record["model"]["vocab"]
    names = {id_: name for name, id_ in vocabulary.items()}
    tokens = bundle.golden()[ROW].tokens
    for half, id_ in zip(("Ã", "©"), tokens, strict=False):  # bytes C3 and A9, as byte-level BPE
        vocabulary[names[id_]], vocabulary[half] = vocabulary[half], id_
    path.write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _asked(bundle: Bundle) -> str:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(bundle.tokenizer_path))
    return str(plain.decode(list(bundle.golden()[ROW].prompt), skip_special_tokens=False))


def _libraries() -> str:
    lib = compiler()
    assert lib is not None
    return f"{lib / 'kotlin-stdlib.jar'}:{lib / 'kotlinx-coroutines-core-jvm.jar'}"
