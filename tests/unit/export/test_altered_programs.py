"""Each kind of altered program of `tests/campaigns/programs.py`, a few times."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[2] / "campaigns" / "programs.py"
KINDS = ("number", "argument", "tensor", "constant", "bytes", "length")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.campaigns.programs import exported

    return exported(tmp_path_factory.mktemp("bundle")).path


@pytest.mark.parametrize("kind", KINDS)
def test_altered_programs_give_an_answer_or_are_refused_by_name(kind: str, bundle: Path) -> None:
    seed = str(random.randrange(1 << 32))
    print("seed", seed)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--bundle", str(bundle), "--only", kind, "--count", "8",
         "--seed", seed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    name, count, *outcomes = done.stdout.split(" | ")
    assert (name, int(count), sum(map(int, outcomes))) == (kind, 8, 8)
    assert kind != "length" or int(outcomes[2]) == 8
