"""What is available is what every control group above the process leaves, cache given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from cloister.runtime.memory import available_bytes

if TYPE_CHECKING:
    from pathlib import Path

MB = 1_000_000
NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def group(root: Path, version: str, path: str, limit: str, used: int, cache: int) -> None:
    directory = root / "sys/fs/cgroup" / version / path
    directory.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("7:cpu,cpuacct:/x\n4:memory:/a/b\n0::/a/b\n")
    return tmp_path


@pytest.mark.parametrize("version", ["", "memory"])
def test_the_limit_of_the_processs_own_group_counts(machine: Path, version: str) -> None:
    group(machine, version, "a/b", str(30 * MB), 10 * MB, 0)
    assert available_bytes(machine) == 20 * MB


@pytest.mark.parametrize("version", ["", "memory"])
def test_a_limit_of_a_group_above_counts(machine: Path, version: str) -> None:
    group(machine, version, "a/b", str(30 * MB), 10 * MB, 0)
    group(machine, version, "a", str(18 * MB), 11 * MB, 0)
    assert available_bytes(machine) == 7 * MB


@pytest.mark.parametrize("version", ["", "memory"])
def test_pages_of_files_just_read_are_not_taken_for_memory_in_use(
    machine: Path, version: str
) -> None:
    group(machine, version, "a/b", str(30 * MB), 29 * MB, 25 * MB)  # a bundle was just hashed
    assert available_bytes(machine) == 26 * MB


def test_a_group_without_a_limit_leaves_what_the_machine_has(machine: Path) -> None:
    group(machine, "", "a/b", "max", 10 * MB, 0)
    assert 0 < available_bytes(machine) <= psutil.virtual_memory().total


def test_a_machine_without_control_groups_leaves_what_it_has(tmp_path: Path) -> None:
    assert 0 < available_bytes(tmp_path) <= psutil.virtual_memory().total
