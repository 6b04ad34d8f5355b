"""Each trial of `tests/campaigns/vault.py`, for a short while."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "campaigns" / "vault.py"


@pytest.mark.parametrize(("trial", "options"), [
    ("kills", ["--count", "300"]), ("flips", ["--count", "20000"]),
    ("damage", ["--count", "300"]), ("faults", []),
    ("crowd", ["--processes", "4", "--count", "300"]),
    ("seals", ["--count", "40000", "--processes", "4"]), ("rotate", ["--gigabytes", "0.3"]),
])
def test_a_short_trial_finds_nothing(trial: str, options: list[str]) -> None:
    seed = str(random.randrange(1 << 32))
    print("seed", seed)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), trial, "--seed", seed, *options],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    print(json.loads(done.stdout))
