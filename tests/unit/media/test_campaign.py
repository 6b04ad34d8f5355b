"""Each kind of file of `tests/campaigns/media.py`, mutated a few times."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[2] / "campaigns" / "media.py"


@pytest.mark.parametrize("kind", [
    "PNG", "PNG of 16 bits", "JPEG", "WebP", "WAV", "FLAC", "Ogg", "MP3"])
def test_mutated_files_are_read_or_refused_by_name(kind: str) -> None:
    seed = str(random.randrange(1 << 32))
    print("seed", seed)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--only", kind, "--count", "10", "--seed", seed],
        env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    name, count, *_, slowest_s, peak_mib = done.stdout.split(" | ")
    assert (name, count) == (f"{kind}, mutated", "10")
    assert float(slowest_s) < 20
    assert int(peak_mib) < 600
