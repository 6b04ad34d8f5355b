"""A wheel has the operators' sources, and where it is asked for their library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w",
         folder, ROOT], check=True, env={**os.environ, "CLOISTER_WHEEL_KERNELS": "1"})
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel],
        check=True)
    return folder


def kernels(action: str, installed: Path, home: Path, compiler: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cloister.cli", "kernels", action, "--json"],
        capture_output=True, text=True, check=False, cwd=home,
        env={**os.environ, "PYTHONPATH": str(installed), "CLOISTER_HOME": str(home),
             "CLOISTER_COMPILER": compiler})
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def test_it_has_every_source_and_says_which_machine_it_is_for(wheel: Path) -> None:
    assert "-cp3" in wheel.name and not wheel.name.endswith("-any.whl")
    package = ROOT / "kernels" / "cloister_kernels"
    names = {f"cloister_kernels/{path.relative_to(package)}" for path in package.rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}
    with ZipFile(wheel) as file:
        held = {name for name in file.namelist() if name.startswith("cloister_kernels/")}
    assert names <= held and "cloister_kernels/cpu/operators.cc" in names
    assert {Path(name).suffix for name in held - names} == {".so", ".json"}


def test_its_library_is_used_where_there_is_no_compiler(installed: Path, tmp_path: Path) -> None:
    found = kernels("status", installed, tmp_path, "/nonexistent")
    assert found["built"] and found["packaged"]
    assert found["instruction_sets"][-1] == "portable"
    assert not (tmp_path / "kernels").exists()


def test_its_library_is_refused_where_it_was_altered(installed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(installed, tmp_path / "copy")
    (library,) = copy.rglob("operators-*.so")
    with library.open("ab") as file:
        file.write(b"\0")
    said = kernels("status", copy, tmp_path, "/nonexistent")
    assert "is not the one that was built; install Cloister again" in " ".join(said.split())


def test_without_it_or_with_other_sources_its_sources_are_built(
    installed: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(installed, tmp_path / "copy")
    with (copy / "cloister_kernels" / "cpu" / "run.cc").open("a") as file:
        file.write("// another line\n")
    assert not kernels("status", copy, tmp_path, "c++")["built"]
    found = kernels("build", copy, tmp_path, "c++")
    assert found["built"] and not found["packaged"]
