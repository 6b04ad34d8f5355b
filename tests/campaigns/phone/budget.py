"""Instructions a token on three emulated ARM processors, which are never turned into seconds.

    python tests/campaigns/phone/budget.py BUNDLE -o counts.json
    cloister bench --bundle BUNDLE --device-class --instructions counts.json --record

The longest golden prompt is answered by ExecuTorch's aarch64 wheel in one thread, three times by
three processes of each processor; a plugin of the emulator counts, from the first token to the
last. Wanted are qemu-user (the static build has no plugins), a compiler for this machine and
g++-aarch64-linux-gnu, and what `aarch64.py` installs.

The wheel's torch has atomic instructions that a Cortex-A53 lacks. Its stand-in has them, and like
it neither dot products nor a choice: XNNPACK asks the system which processor it is on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from cloister import family
from cloister.bundle import Bundle

HERE = Path(__file__).parent
SLOW = True
TOOLS = ("qemu-aarch64", "aarch64-linux-gnu-g++", "cc")
REPEATS = 3
# What is emulated, and the part number that the system tells of it (`CPU part` of /proc/cpuinfo).
PROCESSORS = {
    "no dot products, as cortex-a53": ("a64fx", "0xd03"),
    "dot products, cortex-a76": ("cortex-a76", "0xd0b"),
    "int8 matrices, max": ("max,sme=off", "0xd0b"),  # see aarch64.py
}
LIBRARIES = (
    "extension/pybindings/_portable_lib.cpython-311-aarch64-linux-gnu.so",
    "kernels/quantized/libquantized_ops_aot_lib.so",
    "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
)


def rows(bundles: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    wheel = aarch64()
    if lacking := [tool for tool in (*TOOLS, *wheel.TOOLS) if not shutil.which(tool)]:
        yield ("instructions a token", "aarch64", f"not run: there is no {', '.join(lacking)}",
               "run")
        return
    for path in bundles:
        found = counts(Bundle.open(path))
        for name, repeats in found["processors"].items():
            yield (f"instructions a token of {Bundle.open(path).manifest.name}",
                   f"aarch64 wheel {version('executorch')}, {name}, {found['emulator']}",
                   f"{repeats[0]:,.0f}, {len(repeats)} repeats "
                   f"{(max(repeats) - min(repeats)) / min(repeats):.0e} apart", "run")


def aarch64() -> ModuleType:
    """The module beside this one, by path: their directory has the name of a module."""
    spec = importlib.util.spec_from_file_location("phone_aarch64", HERE / "aarch64.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counts(bundle: Bundle) -> dict[str, Any]:
    """Return what `cloister bench --instructions` reads."""
    entry = next(each for each in bundle.manifest.programs if each.backend == "xnnpack")
    golden = max(bundle.golden(), key=lambda row: len(row.tokens))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = Path(os.environ.get("CLOISTER_TEST_CACHE") or scratch, "aarch64").absolute()
        if not (folder / "missing" / "none.so").is_file():
            aarch64().install(folder)
        build(folder, scratch)
        found = {
            name: [count(scratch, folder, prefix, emulated, [
                str(bundle.path.absolute() / entry.file), str(bundle.manifest.prefill_chunk),
                str(len(golden.tokens)), *map(str, golden.prompt)], golden.tokens)
                for _ in range(REPEATS)]
            for name, (emulated, part) in PROCESSORS.items()
            if (prefix := root(folder, scratch / part, part))}
    said = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True)
    return {"program": bundle.manifest.files[entry.file].sha256, "processors": found,
            "tokens": len(golden.tokens) - 1, "emulator": f"QEMU {said.stdout.split()[2]}"}


def count(
    scratch: Path, folder: Path, prefix: Path, emulated: str, arguments: Sequence[str],
    golden: Sequence[int],
) -> float:
    """Return the mean of the instructions between two ids, which must be the golden ones."""
    executorch = folder / "site" / "executorch"
    paths = (scratch, folder / "missing", folder / "site" / "torch" / "lib",
             *(executorch.joinpath(library).parent for library in LIBRARIES))
    done = subprocess.run(
        ["qemu-aarch64", "-cpu", emulated, "-plugin", scratch / "count.so",
         "-E", f"LD_LIBRARY_PATH={':'.join(map(str, paths))}", scratch / "step", *arguments],
        env={"PATH": os.environ["PATH"], "QEMU_LD_PREFIX": str(prefix)}, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert tuple(map(int, done.stdout.split())) == tuple(golden), "other tokens than the golden"
    at = [int(number) for number in re.findall(r"^instructions (\d+)$", done.stderr, re.MULTILINE)]
    assert len(at) == len(golden)
    between = [after - before for before, after in pairwise(at)]
    return sum(between) / len(between)


def root(folder: Path, prefix: Path, part: str) -> Path:
    """Return a root like that in `folder`, whose system tells of another processor."""
    (prefix / "proc").mkdir(parents=True, exist_ok=True)
    for each in (folder / "root").iterdir():
        if each.name != "proc" and not (prefix / each.name).exists():
            (prefix / each.name).symlink_to(each)
    told = folder.joinpath("root/proc/cpuinfo").read_text()
    (prefix / "proc" / "cpuinfo").write_text(re.sub(r"(CPU part\s*: )\S+", rf"\g<1>{part}", told))
    return prefix


def build(folder: Path, scratch: Path) -> None:
    """Build the plugin, the program, and a stand-in for Python, which the wheel's library wants."""
    executorch, torch = folder / "site" / "executorch", folder / "site" / "torch" / "lib"
    libraries = [executorch / each for each in LIBRARIES]

    def symbols(kind: str, files: Sequence[Path]) -> set[str]:
        listed = subprocess.run(["nm", "-D", f"--{kind}-only", *files], capture_output=True,
                                text=True, check=False).stdout
        return {name for letter, name in re.findall(r" (\w) ([^@\s]+)", listed) if letter != "w"}

    system = [file for file in (folder / "root").glob("**/*.so*") if file.is_file()]
    absent = symbols("undefined", libraries) - symbols(
        "defined", [*libraries, *system, torch / "libtorch_cpu.so", torch / "libc10.so"])
    (scratch / "none.s").write_text("".join(
        f".globl {name}\n{name}:\n" for name in sorted(absent)) + "mov x0, #0\nret\n")
    cross = "aarch64-linux-gnu-g++"
    for command in (
        (cross, "-nostdlib", "-shared", "none.s", "-o", "libtorch_python.so"),
        (cross, "-std=c++17", "-O2", "-DC10_USING_CUSTOM_GENERATED_MACROS",
         f"-I{executorch}/include",
         f"-I{executorch}/include/executorch/runtime/core/portable_type/c10", HERE / "step.cpp",
         "-Wl,--no-as-needed,--allow-shlib-undefined", *libraries, "-o", "step"),
        ("cc", "-O2", "-shared", "-fPIC", HERE / "count.c", "-o", "count.so"),
    ):
        subprocess.run(command, cwd=scratch, check=True)
    (scratch / "libtorch.so").symlink_to("libtorch_python.so")  # which has no symbols of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a directory, or a tier of the shipped family")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[2]))  # for tests.phone
    found = counts(Bundle.open(family.bundle(given.bundle)))
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
