"""Directories come from the environment, or from the platform."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister import settings as module
from cloister.settings import Settings, processors


def test_the_environment_names_home_and_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLOISTER_DATA", str(tmp_path / "data"))
    settings = Settings.from_environment()
    assert settings.home == tmp_path / "home"
    assert settings.data == tmp_path / "data"
    assert settings.seen_programs.parent == settings.home


def test_without_it_home_lies_where_the_platform_keeps_user_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CLOISTER_HOME")
    monkeypatch.delenv("CLOISTER_DATA", raising=False)
    settings = Settings.from_environment()
    assert settings.home.name == "cloister"
    assert settings.data is None


@pytest.mark.parametrize(("files", "count"), [
    ({}, 8),
    ({"cpu.max": "max 100000\n"}, 8),
    ({"cpu.max": "200000 100000\n"}, 2),
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu.max": "5000 100000\n"}, 1),
    ({"cpu.max": "6400000 100000\n"}, 8),
    ({"cpu.max": ""}, 8),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
])
def test_a_quota_of_the_control_group_bounds_the_processors(
    files: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processors() == count


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_bound_to_one_processor_runs_programs_on_one_thread() -> None:
    program = """
import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from cloister import Engine
from cloister.runtime import _executorch
Engine("nano-1")
print(_executorch._bindings()._threadpool_get_thread_count())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.strip() == "1"
