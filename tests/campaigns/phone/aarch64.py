"""ExecuTorch's aarch64 wheel with XNNPACK's weights cache on, on two emulated processors.

Debian's packages for arm64 are unpacked into a directory, wheels beside them, and an emulator of
programs (qemu-user-static) takes files from there first. Wanted are mmdebstrap, qemu-user-static,
clang-19 and lld-19. It takes some 1.2 GB in CLOISTER_TEST_CACHE, or in a temporary place. Times
mean nothing here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.phone import answers

SLOW = True
TOOLS = ("mmdebstrap", "qemu-aarch64-static", "clang-19", "ld.lld-19")
# The SME of Debian 12's QEMU 7.2 gives wrong products, at which 8-bit models fail; 10.0 is right.
PROCESSORS = {"cortex-a76": "dot products", "max,sme=off": "int8 matrices"}
WHEELS = ("torch", "executorch", "tokenizers", "msgspec", "platformdirs", "numpy", "filelock",
          "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions")
# What cpuinfo asks Linux for; which instructions there are, it asks the emulator.
CPUINFO = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\n" \
    "CPU part\t: 0xd0b\nCPU revision\t: 1\n\n"


def rows(bundles: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    if lacking := [tool for tool in TOOLS if not shutil.which(tool)]:
        yield "golden answers", "aarch64", f"not run: there is no {', '.join(lacking)}", "run"
        return
    said = subprocess.run(["qemu-aarch64-static", "--version"], capture_output=True, text=True)
    qemu = said.stdout.split()[2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("CLOISTER_TEST_CACHE") or temporary, "aarch64").absolute()
        if not (folder / "missing" / "none.so").is_file():
            install(folder)
        environment = {
            "QEMU_LD_PREFIX": f"{folder}/root", "LD_LIBRARY_PATH": f"{folder}/missing",
            "PYTHONHOME": f"{folder}/root/usr", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{folder}/site:{answers.ROOT}/sdk:{answers.ROOT}",
            "CLOISTER_HOME": temporary}
        for path in bundles:
            for processor, has in PROCESSORS.items():
                where = (f"aarch64 wheel {version('executorch')}, {processor} with {has}, "
                         f"emulated by QEMU {qemu}")
                emulator = ("qemu-aarch64-static", "-cpu", processor)
                yield from answers.rows(
                    path.absolute(), where, (*emulator, f"{folder}/root/usr/bin/python3.11"),
                    {"PATH": os.environ["PATH"], **environment})


def install(folder: Path) -> None:
    """Unpack a Debian with Python, the wheels, and what takes the place of CUDA's libraries."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    include = "python3.11,libatomic1,libgomp1,libstdc++6"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64",
                    "--skip=check/qemu", f"--include={include}", "bookworm", "root"],
                   cwd=folder, check=True)
    proc = folder / "root" / "proc"
    proc.mkdir(exist_ok=True)
    proc.joinpath("cpuinfo").write_text(CPUINFO)
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in WHEELS]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", "site",
                    "--no-deps", "--no-compile", "--only-binary", ":all:", "--python-version",
                    "3.11", "--platform", "manylinux_2_28_aarch64", "--platform",
                    "manylinux_2_17_aarch64", *wanted], cwd=folder, check=True)
    stand_in(folder)


def stand_in(folder: Path) -> None:
    """Write one library under all names that torch's build for CUDA wants and nothing here has.

    Each of its functions gives 0. They have the versions that are asked for, or the loader stops.
    """
    def symbols(kind: str, files: Sequence[Path]) -> set[tuple[str, str]]:
        listed = subprocess.run(["nm", "-D", f"--{kind}-only", *files], capture_output=True,
                                text=True, check=False).stdout  # the static linker's are refused
        found = re.findall(r" (\w) ([^@\s]+)(?:@+(\S+))?$", listed, re.MULTILINE)
        return {(name, at) for letter, name, at in found if letter not in "wv"}  # weak and nowhere

    site, root = folder / "site", folder / "root"
    wheels = [*site.glob("torch/**/*.so*"), *site.glob("executorch/**/*.so")]
    system = [file for file in root.glob("**/*.so*") if file.is_file()]
    defined = {name for name, _ in symbols(
        "defined", [*wheels, *system, root / "usr/bin/python3.11"])}
    versions = defaultdict[str, list[str]](list)
    for name, at in symbols("undefined", wheels):
        if name not in defined:
            versions[at].append(name)
    headers = subprocess.run(["readelf", "-d", *wheels], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", headers.stdout))
    missing = folder / "missing"
    missing.mkdir()
    (missing / "none.s").write_text("".join(
        f".globl {name}\n.type {name}, %function\n{name}:\n"
        for names in versions.values() for name in names) + "mov x0, #0\nret\n")
    (missing / "none.map").write_text("".join(
        f"{at} {{ {'; '.join(names)}; }};\n" for at, names in versions.items() if at))
    subprocess.run(["clang-19", "--target=aarch64-linux-gnu", "-nostdlib", "-shared",
                    "-fuse-ld=lld", "none.s", "-Wl,--version-script=none.map", "-o", "none.so"],
                   cwd=missing, check=True)
    for name in needed - {file.name for file in (*wheels, *system)}:
        (missing / name).symlink_to("none.so")
