"""What React Native's glue is built against: packages from npm, without running their code."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import platformdirs

GLUE = Path(str(resources.files("cloister.embed"))) / "glue" / "react-native"


@cache
def modules() -> Path | str:
    """Return the folder `node_modules` of the glue's package.json, or why it is not to be had.

    Installed once for each contents of that file, into CLOISTER_TEST_CACHE or the user's cache.
    """
    if not shutil.which("npm"):
        return "this machine has no npm"
    wanted = (GLUE / "package.json").read_bytes()
    given = os.environ.get("CLOISTER_TEST_CACHE")
    folder = Path(given) if given else platformdirs.user_cache_path("cloister-tests", False)
    home = folder / f"react-native-{hashlib.sha256(wanted).hexdigest()[:12]}"
    if not home.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            Path(work, "package.json").write_bytes(wanted)
            done = subprocess.run(
                ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=work, capture_output=True, text=True, timeout=540)
            if done.returncode:
                return f"npm gave no packages: {' '.join(done.stderr.split()[:12])}"
            try:
                Path(work).rename(home)
            except OSError:  # another process was first
                assert home.is_dir()
            Path(work).mkdir(exist_ok=True)  # which is then deleted
    return home / "node_modules"
