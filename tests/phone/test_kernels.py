"""The CMake target of Cloister's own operators: an app gives a bundle's golden answers with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import executorch
import pytest
import torch
from executorch.extension.pybindings import _portable_lib

import cloister_kernels
from cloister import pipeline, reference
from cloister.bundle import Bundle
from cloister.model.checkpoint import Checkpoint
from cloister.model.recipe import Recipe
from cloister.quantize.apply import quantize

pytestmark = pytest.mark.slow

APP = Path(__file__).parent / "kernels"
KERNELS = Path(cloister_kernels.__file__).parent
EXECUTORCH = Path(next(iter(executorch.__path__)))
INCLUDES = (EXECUTORCH / "include",
            EXECUTORCH / "include" / "executorch" / "runtime" / "core" / "portable_type" / "c10")
CROSS = "aarch64-linux-gnu-g++"


def made(target: str, folder: Path, *options: str) -> str:
    """Build a target of the app in `folder`; return what the compiler was told."""
    lines = ""
    for command in (
        ("cmake", "-S", APP, "-B", folder, f"-DKERNELS={KERNELS}", "-DCMAKE_BUILD_TYPE=Release",
         f"-DWHEEL_INCLUDES={';'.join(map(str, INCLUDES))}", *options),
        ("cmake", "--build", folder, "--target", target, "-j2", "-v"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout
    return lines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    quantize(Checkpoint.open(reference.checkpoint_path("nano-1")), folder / "quantized",
             Recipe.parse("8da4w-g32"))
    return pipeline.export(
        Checkpoint.open(folder / "quantized"), folder / "own.cloister", backends=("cloister",))


@pytest.mark.skipif(not shutil.which("cmake"), reason="no CMake")
def test_an_app_decodes_what_python_does_in_every_set_of_this_processor(
    bundle: Bundle, tmp_path: Path
) -> None:
    python = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if python.suffix == ".a" or not python.exists():
        pytest.skip("no shared library of this Python")
    operators = EXECUTORCH / "kernels" / "quantized" / "libquantized_ops_aot_lib.so"
    places = [Path(torch.__file__).parent / "lib", python.parent]
    made("step", tmp_path, f"-DWHEEL_LIBRARIES={_portable_lib.__file__};{operators};{python}",
         f"-DCMAKE_BUILD_RPATH={';'.join(map(str, places))}")
    row = max(bundle.golden(), key=lambda each: len(each.tokens))
    words = [tmp_path / "step", bundle.path / bundle.manifest.programs[0].file,
             str(bundle.manifest.prefill_chunk), str(len(row.tokens)), *map(str, row.prompt)]
    for kernels in ("", "portable"):
        done = subprocess.run(words, capture_output=True, text=True, check=False,
                              env={**os.environ, "CLOISTER_KERNELS": kernels})
        assert done.returncode == 0, done.stderr
        assert tuple(map(int, done.stdout.split())) == tuple(row.tokens)


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which(CROSS)), reason="no compiler")
def test_each_set_of_arm_is_compiled_for_it(tmp_path: Path) -> None:
    lines = made(
        "cloister_kernels_cpu", tmp_path, "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}",
        f"-DCMAKE_C_COMPILER={CROSS.replace('g++', 'gcc')}")
    commands = [line for line in lines.splitlines() if "neon.cc" in line and " -c " in line]
    assert len(commands) == 2
    assert any("+i8mm" in line and "-DCLOISTER_I8MM" in line for line in commands)
    assert all("-march=armv8.2-a+dotprod" in line and "-O3" in line for line in commands)
    assert "avx" not in lines
    (archive,) = tmp_path.rglob("libcloister_kernels_cpu.a")
    held = subprocess.run(["ar", "t", archive], capture_output=True, text=True, check=True).stdout
    assert len(held.split()) == 5


@pytest.mark.skipif(not shutil.which("cmake"), reason="no CMake")
def test_without_executorch_it_says_what_comes_first(tmp_path: Path) -> None:
    done = subprocess.run(["cmake", "-S", KERNELS, "-B", tmp_path], capture_output=True, text=True,
                          check=False)
    assert done.returncode and "add ExecuTorch before it" in " ".join(done.stderr.split())
