"""The C++ glue and the stock runner, built with CMake against the PyPI wheel of ExecuTorch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.phone.golden import spoken

from cloister.bundle import Bundle
from cloister.embed import cpp
from cloister.embed.facts import facts_of
from cloister.embed.write import embed
from cloister.manifest import PromptFormat

HERE = Path(__file__).parent / "cpp"
LOADS = ("mapped", "file")  # ExecuTorch's FileDataLoader frees what it read
SANITIZED = ("-DCMAKE_CXX_FLAGS=-g -fsanitize=address,undefined -fno-sanitize-recover=undefined "
             "-fno-sanitize=vptr")  # the wheel's classes are declared, not defined
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FROM_A_SHELL = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def readme_commands() -> list[str]:
    """Return the commands that lead from a bundle to the first answer."""
    readme = Path(cpp.__file__).parent / "glue" / "cpp" / "README.md"
    return re.findall(r"```sh\n(.*?)```", readme.read_text("utf-8"), re.S)[0].splitlines()


def missing() -> str:
    """Return what this machine lacks, in words; nothing if it lacks nothing."""
    lacking = [tool for tool in ("cmake", "c++", "make") if shutil.which(tool) is None]
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    return ", ".join([*lacking, *([] if library.suffix != ".a" and library.exists() else
                                  ["a shared library of this Python"])])


def embedded(bundle: Bundle, directory: Path) -> Path:
    """Return a new directory with the glue and the files of `bundle`."""
    embed(bundle, "cpp", directory / "embedded")
    return directory / "embedded"


def build(target: str, glue: Path, directory: Path, *options: str) -> Path:
    """Return `drive` or `stock`, built with `glue` in `directory`."""
    for command in (("cmake", "-S", HERE, "-B", directory, f"-DGLUE={glue}", *options,
                     "-DCLOISTER_WHEEL=ON", f"-DPython3_EXECUTABLE={sys.executable}"),
                    ("cmake", "--build", directory, "-j2", "--target", target)):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory / target


@dataclass
class Turn:
    """What came of a line: the pieces of the answer, and how it ended or what was refused."""

    pieces: list[bytes] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.decode() for piece in self.pieces)  # each is whole characters


def driven(drive: Path, model: Path, *lines: str, **options: object) -> list[Turn]:
    """Return what came of the start, and of each line that was said.

    Raises:
        ChildProcessError: the process did not end well; the signal's name, or the code.
    """
    words = [str(word) for pair in {"directory": model, **options}.items() for word in pair]
    done = subprocess.run([drive, *words], input="\n".join(lines), text=True, capture_output=True,
                          env=ENVIRONMENT)
    _need_success(done)
    said = [line.split(maxsplit=2)[2] for line in lines if " " in line]
    assert not [text for text in said if text in done.stderr]
    turns = [Turn()]
    for event in filter(None, done.stdout.splitlines()):
        if event.startswith("piece "):
            turns[-1].pieces.append(bytes(map(int, event.split()[1].rstrip(",").split(","))))
            continue
        turns[-1].events.append(event)
        if event.split()[0] in ("ready", "result", "thrown", "refused"):
            turns.append(Turn())
    return turns[:-1]


def stock_answers(stock: Path, bundle: Bundle, load: str, cache: str = "on") -> list[str]:
    """Return what the runner says to golden prompts, in a process of its own.

    Raises:
        ChildProcessError: the process did not end well; the signal's name, or the code.
    """
    out = stock.parent / "answers"
    program = bundle.path / bundle.manifest.programs[0].file
    words = [word for each in spoken(bundle) for word in (str(each.tokens), each.prompt)]
    done = subprocess.run(
        [stock, program, bundle.tokenizer_path, load, cache, out, *words], capture_output=True,
        env=ENVIRONMENT)
    _need_success(done)
    return [text.decode() for text in out.read_bytes().split(b"\0")[:-1]]


def _need_success(done: subprocess.CompletedProcess[Any]) -> None:
    if done.returncode:
        raise ChildProcessError(
            signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr)


def golden(drive: Path, glue: Path, bundle: Bundle, **options: object) -> tuple[int, int]:
    """Return how many golden answers the glue gives, and to how many prompts it can be asked for.

    An answer that was cut when it was recorded is the beginning of what the glue gives.
    """
    said, same, count = facts_of(bundle), 0, 0
    for system in ("", *_systems(bundle, said.format)):
        opening = said.format.begin
        if system:
            assert said.format.system
            opening = said.format.system.before + system + said.format.system.after
        before, between = (opening + said.format.user.before,
                           said.format.user.after + said.format.answer)
        asked = [(each, each.prompt.removeprefix(before).removesuffix(between))
                 for each in spoken(bundle)
                 if each.prompt.startswith(before) and each.prompt.endswith(between)]
        asked = [(each, text) for each, text in asked
                 if not any(special in text for special in (*said.special, "\n"))]
        if not asked:
            continue
        lines = [line for _, text in asked for line in ("reset", f"say 0 {text}")]
        turns = driven(drive, glue / "model", *lines, system=system,
                       limit=max(each.tokens for each, _ in asked), **options)
        for (each, _), turn in zip(asked, turns[1:], strict=True):
            whole = [each.answer.removesuffix(end) for end in said.ends
                     if each.answer.endswith(end)]
            same += turn.text == whole[0] if whole else turn.text.startswith(each.answer)
        count += len(asked)
    return same, count


def _systems(bundle: Bundle, format_: PromptFormat) -> set[str]:
    """Return the system prompts of golden prompts."""
    if format_.system is None:
        return set()
    before, after = format_.system.before, format_.system.after
    return {each.prompt.removeprefix(before).partition(after)[0] for each in spoken(bundle)
            if each.prompt.startswith(before) and before}
