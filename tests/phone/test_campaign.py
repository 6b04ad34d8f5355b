"""The campaign says what was run, and does not hide what failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.bundle import Bundle
from cloister.reference import bundle_path

PHONE = Path(__file__).parents[1] / "campaigns" / "phone.py"


def campaign(*given: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run([sys.executable, PHONE, "--json", *given], capture_output=True,
                          env={"PYTHONPATH": ":".join(sys.path)}, text=True)
    return done.returncode, json.loads(done.stdout)["rows"]


@pytest.mark.slow
def test_a_wheel_with_the_weights_cache_on_gives_all_of_a_bundle() -> None:
    code, rows = campaign("--only", "wheel", "nano-1")
    assert code == 0
    golden = len(Bundle.open(bundle_path("nano-1")).golden())
    assert [row["result"] for row in rows[:2]] == [f"{golden} of {golden}"] * 2
    same, of = rows[2]["result"].split(" of ")
    assert same == of
    assert {row["how"] for row in rows} == {"run"}


def test_a_platform_that_fails_is_a_row_and_an_exit_code(tmp_path: Path) -> None:
    code, (row,) = campaign("--only", "wheel", str(tmp_path))
    assert code == 1
    assert row["result"].startswith("failed: ")
