"""Kotlin's compiler, and the glue for Android run with it on the JVM."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import platformdirs
from tokenizers import Tokenizer

from cloister.bundle import Bundle, Golden
from cloister.embed import android
from cloister.embed.write import embed

__all__ = ["ODD", "Trial", "asked", "compile_kotlin", "compiler", "missing", "trial"]

HERE = Path(__file__).parent
TRIAL = HERE / "kotlin"
PACKAGE = "kotlin-compiler@2.4.20"
MOST = 1024  # tokens of a context that is filled
ODD = "a\"b\\f $x ${y} \t\n\r\f\x00 é 😀 \u2028 \\"
HALVES = ("Ã", "©")  # the bytes C3 and A9, as byte-level BPE writes them
Trial = dict[str, dict[str, str]]  # by scenario and name


def missing() -> str:
    """Return what this machine lacks to try the glue, or nothing."""
    return ", ".join(tool for tool in ("java", "npm") if not shutil.which(tool))


@cache
def compiler() -> Path:
    """Return the jars of npm's kotlin-compiler, among which is kotlinx.coroutines.

    Fetched once into CLOISTER_TEST_CACHE or the user's cache.

    Raises:
        RuntimeError: npm did not give it.
    """
    given = os.environ.get("CLOISTER_TEST_CACHE")
    folder = Path(given) if given else platformdirs.user_cache_path("cloister-tests", False)
    home = folder / PACKAGE
    if not home.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            done = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, timeout=540,
                                  capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"npm gave no {PACKAGE}: {' '.join(done.stderr.split()[:12])}")
            with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
                archive.extractall(work, filter="data")
            with contextlib.suppress(OSError):  # another process was first
                Path(work, "package").rename(home)
    return home / "lib"


def compile_kotlin(sources: list[Path], out: Path) -> None:
    """Compile Kotlin `sources` into the directory `out`.

    Raises:
        RuntimeError: it does not compile; it says where.
    """
    lib = compiler()
    done = subprocess.run([
        "java", "-Xmx1500m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
        "-cp", str(lib / "kotlin-preloader.jar"), "org.jetbrains.kotlin.preloading.Preloader",
        "-cp", str(lib / "kotlin-compiler.jar"), "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
        "-no-stdlib", "-no-reflect", "-jvm-target", "11", "-classpath", _libraries(),
        "-d", str(out), *map(str, sources)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])


def trial(bundle: Bundle, scratch: Path) -> Trial:
    """Return what tests/phone/kotlin/Trial.kt prints about the glue with `bundle`.

    A context that would take minutes to fill is not filled.
    """
    out, split = scratch / "app", scratch / "split"
    facts = embed(bundle, "android", out)
    model = out / "model/src/main/assets"
    shutil.copytree(model, split)
    end = facts.format.user.after + facts.format.answer
    row = asked(bundle)
    assert row is not None
    tokenizer = split_characters(split / "tokenizer.json", row)
    odd = android.constants(replace(facts, ends=(ODD,)))["Model.kt"]
    (out / "Odd.kt").write_text(odd.replace("val MODEL", "val ODD"))
    compile_kotlin([*out.glob("*.kt"), *TRIAL.glob("*.kt")], scratch / "classes")
    prompt, answer = (text_of(bundle, ids) for ids in (row.prompt, row.tokens))
    before, _, ask = prompt.removesuffix(end).rpartition(facts.format.user.before)
    properties = {
        "model": model, "split": split, "scratch": scratch, "splitSha256": tokenizer,
        "runner": f"{sys.executable} -P -m tests.phone.runner", "ask": ask,
        "short": str(bundle.manifest.context > MOST).lower()}
    if before and facts.format.system:
        around = facts.format.system
        properties["system"] = before.removeprefix(around.before).removesuffix(around.after)
    done = subprocess.run(
        ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
         *(f"-D{name}={value}" for name, value in properties.items()),
         "-cp", f"{scratch / 'classes'}:{_libraries()}", "cloister.TrialKt"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))})
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found: Trial = defaultdict(dict, {"golden": {"answer": answer, "ask": ask}})
    for line in done.stdout.splitlines():
        scenario, name, value = line.split(" ")
        found[scenario][name] = b64decode(value).decode()
    return found


def asked(bundle: Bundle) -> Golden | None:
    """Return a golden answer to a text that begins with two tokens of its own; None without one."""
    form = bundle.manifest.prompt_format
    assert form is not None
    return next((row for row in bundle.golden() if _splits(row) and text_of(
        bundle, row.prompt).endswith(form.user.after + form.answer)), None)


def split_characters(path: Path, row: Golden) -> str:
    """Change the tokenizer so that the first two tokens of a golden answer are halves of an é.

    Return its new sha256.
    """
    record = json.loads(path.read_text("utf-8"))
    vocabulary = record["model"]["vocab"]
    names = {id_: name for name, id_ in vocabulary.items()}
    for half, id_ in zip(HALVES, row.tokens, strict=False):
        vocabulary[names[id_]], vocabulary[half] = vocabulary[half], id_
    path.write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text_of(bundle: Bundle, ids: Sequence[int]) -> str:
    plain = Tokenizer.from_file(str(bundle.tokenizer_path))
    return str(plain.decode(list(ids), skip_special_tokens=False))


def _splits(row: Golden) -> bool:
    """Whether its answer is long enough to be stopped, and begins with two tokens of its own."""
    once = Counter((*row.prompt, *row.tokens))
    return len(row.tokens) >= 8 and once[row.tokens[0]] == once[row.tokens[1]] == 1


def _libraries() -> str:
    return ":".join(str(compiler() / f"{name}.jar")
                    for name in ("kotlin-stdlib", "kotlinx-coroutines-core-jvm"))
