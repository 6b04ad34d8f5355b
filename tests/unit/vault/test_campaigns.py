"""Each trial of `tests/campaigns/vault.py`, for a short while."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[2] / "campaigns" / "vault.py"


@pytest.mark.parametrize(("trial", "options"), [
    ("kills", ["--count", "100"]), ("flips", ["--count", "5000"]),
    ("damage", ["--count", "150"]), ("faults", []),
    ("crowd", ["--processes", "4", "--count", "150"]),
    ("seals", ["--count", "40000", "--processes", "4"]), ("rotate", ["--gigabytes", "0.1"]),
])
def test_a_short_trial_finds_nothing(trial: str, options: list[str]) -> None:
    seed = str(random.randrange(1 << 32))
    print("seed", seed)
    # None of them cuts the power: what a disk takes to flush would only make them slow.
    scratch = {"TMPDIR": "/dev/shm"} if Path("/dev/shm").is_dir() else {}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), trial, "--seed", seed, *options],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", **scratch},
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    print(json.loads(done.stdout))
