"""The C++ glue and the stock runner, built by CMake against ExecuTorch's wheel."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.phone import cpp_glue, old_export
from tests.phone.cpp_glue import LOADS, driven, golden, stock_answers
from tests.phone.golden import spoken

from cloister import reference
from cloister.bundle import Bundle
from cloister.embed.facts import facts_of

Row = tuple[str, str, str, str]
ON = f"{platform.machine()} wheel {version('executorch')}"
GLUE, STOCK = f"C++ glue, {ON}", f"stock runner, {ON}, weights cache on"
LONG = "again " * 40_000


def rows(bundles: Sequence[Path]) -> Iterator[Row]:
    if lacking := cpp_glue.missing():
        yield "golden answers", GLUE, f"not run: this machine lacks {lacking}", "run"
        return
    for path in bundles:
        with tempfile.TemporaryDirectory() as work:
            yield from _of(Bundle.open(path), Path(work))
    with tempfile.TemporaryDirectory() as work:
        yield from _old(Path(work))
    with tempfile.TemporaryDirectory() as work:
        bundle = Bundle.open(reference.bundle_path("nano-1"))
        glue, special = cpp_glue.embedded(bundle, Path(work)), facts_of(bundle).special[0]
        yield ("commands of the README, from a bundle to the first answer", GLUE,
               _first_answer(Path(work)), "run")
        drive = cpp_glue.build("drive", glue, Path(work, "build"), cpp_glue.SANITIZED)
        _refusals(drive, glue, special)  # which raises where a sanitizer ends the process
        yield "sanitizers (address, undefined behaviour)", GLUE, "nothing found", "run"
        yield ("it compiles", "C++ glue, headers of ExecuTorch 1.4.1", _compiled(glue), "compiled")
    yield "the glue with a build of ExecuTorch from source", "Android, iOS", "-", "written"


def _of(bundle: Bundle, work: Path) -> Iterator[Row]:
    name, glue = bundle.manifest.name, cpp_glue.embedded(bundle, work)
    drive, stock = (cpp_glue.build(each, glue, work / "build") for each in ("drive", "stock"))
    for load in LOADS:
        yield f"golden answers of {name}", f"{STOCK}, {load}", _same(stock, bundle, load), "run"
        for cache in ("on", "off"):
            same, asked = golden(drive, glue, bundle, load=load, cache=cache)
            yield (f"golden answers of {name}", f"{GLUE}, weights cache {cache}, {load}",
                   f"{same} of {asked}" if asked else
                   "not run: its golden answers go on from begun ones", "run")
    yield f"refused by name, {name}", GLUE, _refusals(
        drive, glue, facts_of(bundle).special[0]), "run"


def _old(work: Path) -> Iterator[Row]:
    before = old_export.bundle(work)
    if before is None:
        yield "golden answers of nano-1, old export", STOCK, "not run: no history here", "run"
        return
    stock = cpp_glue.build("stock", cpp_glue.embedded(before, work), work / "build")
    for load in LOADS:
        yield ("golden answers of nano-1, old export", f"{STOCK}, {load}",
               _same(stock, before, load), "run")


def _same(stock: Path, bundle: Bundle, load: str) -> str:
    asked = spoken(bundle)
    try:
        said = stock_answers(stock, bundle, load)
    except ChildProcessError as error:
        return str(error)
    same = sum(each.answer == text for each, text in zip(asked, said, strict=True))
    return f"{same} of {len(asked)}"


def _refusals(drive: Path, glue: Path, special: str) -> str:
    """Return what the glue says to what it must refuse, and to a text that is too long."""
    model = glue / "model"
    starts: list[dict[str, object]] = [{"memory": 1}, {"wrong": 0}, {"limit": 0}]
    lines = [f"say 0 {special}", f"say 0 {LONG}", "twice 1 Tell me a story",
             "close 1 Tell me a story", "say 0 Hello"]
    events = [driven(drive, model, **start)[-1].events[-1] for start in starts]
    events.append(driven(drive, glue)[-1].events[-1])  # where the files are not
    events += [each.events[0] for each in driven(drive, model, *lines, limit=8)[1:]]
    return ", ".join(event.split()[1] for event in events)


def _first_answer(work: Path) -> str:
    began = time.perf_counter()
    commands = cpp_glue.readme_commands()
    for command in commands:
        subprocess.run(command, shell=True, cwd=work, check=True, capture_output=True,
                       env=cpp_glue.FROM_A_SHELL)
    return f"{len(commands)} commands, {time.perf_counter() - began:.0f} s"


def _compiled(glue: Path) -> str:
    source = Path(os.environ.get("TEST_EXECUTORCH", "/nowhere"))
    if not source.is_dir():
        return "not run: TEST_EXECUTORCH must name a checkout of ExecuTorch's v1.4.1"
    with tempfile.TemporaryDirectory() as around:  # <executorch/...> is the checkout itself
        Path(around, "executorch").symlink_to(source.absolute())
        places = (around, source / "runtime/core/portable_type/c10",
                  source / "extension/llm/tokenizers/include")
        done = subprocess.run(
            ["c++", "-std=c++17", "-fsyntax-only", "-DC10_USING_CUSTOM_GENERATED_MACROS",
             *(f"-isystem{place}" for place in places), glue / "cloister.cpp"],
            capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    return f"no: {errors[0]}" if done.returncode else "yes"
