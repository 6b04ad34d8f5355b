"""Modules of Cloister run in processes of their own, so that each starts with an empty memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from cloister.errors import WorkerError

__all__ = ["run"]


def run(module: str, *arguments: str, what: str, debug: bool = False) -> dict[str, Any]:
    """Run `module` in a new process, and return the JSON object that it prints last.

    Raises:
        WorkerError: the process failed; the sentence names it by `what`.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE, stderr=None if debug else subprocess.DEVNULL, check=False,
    )
    if done.returncode:
        raise WorkerError(
            f"The {what} process ended with exit status {done.returncode}; run it again with "
            "--debug to see why."
        )
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record
