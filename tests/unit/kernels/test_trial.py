"""`trial.cc`: random shapes through each instruction set, under sanitizers, and of ARM emulated."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from cloister_kernels.library import objects

TRIAL = Path(__file__).with_name("trial.cc")
CROSS, EMULATOR, OLDER = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "qemu-x86_64-static"


def build(folder: Path, compiler: str, machine: str | None, *flags: str) -> Path:
    made = objects(compiler, folder, [(str(TRIAL),)], flags, machine)
    path = folder / "trial"
    subprocess.run([compiler, *flags, "-o", path, *made], check=True)
    return path


def sets(*command: str | Path) -> list[str]:
    """Run a trial, and return the sets that it tried."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return [line.partition(":")[0] for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_no_set_reads_or_writes_what_it_must_not(tmp_path: Path) -> None:
    trial = build(
        tmp_path, "c++", None, "-O1", "-g", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined")
    assert sets(trial, "1", "40")[-1] == "portable"


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which(OLDER), reason="no emulator of x86-64")
def test_a_processor_without_a_set_runs_a_lower_one(tmp_path: Path) -> None:
    trial = build(tmp_path, "c++", None, "-O2", "-static")
    assert sets(OLDER, "-cpu", "Haswell", trial, "1", "5") == ["avx2", "portable"]
    assert sets(OLDER, "-cpu", "Nehalem", trial, "1", "5") == ["portable"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason="no compiler or emulator of ARM")
def test_arm(tmp_path: Path) -> None:
    trial = build(tmp_path, CROSS, "aarch64", "-O2", "-static")
    assert sets(EMULATOR, "-cpu", "max", trial, "1", "20") == ["i8mm", "neon", "portable"]
    assert sets(EMULATOR, "-cpu", "neoverse-n1", trial, "1", "5") == ["neon", "portable"]
    assert sets(EMULATOR, "-cpu", "cortex-a53", trial, "1", "3") == ["portable"]
