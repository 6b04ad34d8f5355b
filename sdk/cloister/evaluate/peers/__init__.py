"""Other runtimes of language models, driven in an interpreter that has them (see `__main__.py`)."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.errors import SettingError, WorkerError

__all__ = ["PEERS", "Peer", "missing", "run", "versions"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A runtime, and what it reads."""

    module: str  # beside this one
    packages: tuple[str, ...]  # that its interpreter needs, as pip names them
    reads_gguf: bool = False  # else what its module converts a folder of transformers' to
    tells_system: bool = False  # its module has a command `about`


PEERS = {
    "llama.cpp": Peer(module="llamacpp", packages=("llama-cpp-python", "numpy"), reads_gguf=True,
                      tells_system=True),
    "openvino": Peer(module="openvino_int4", packages=(
        "openvino", "optimum-intel", "nncf", "transformers", "torch")),
    "onnxruntime-genai": Peer(module="onnxruntime_int4", packages=(
        "onnxruntime-genai", "onnx-ir", "transformers", "torch")),
}


def versions(peer: Peer, python: str) -> dict[str, str | None]:
    """Return the version of each of the peer's packages that `python` has, None for others.

    Raises:
        SettingError: `python` is no interpreter.
        WorkerError: it failed.
    """
    found: dict[str, str | None] = run(peer, python, "versions", *peer.packages)
    return found


def missing(found: dict[str, str | None]) -> str | None:
    """Say which packages are not there, if any."""
    names = [name for name, version in found.items() if version is None]
    return f"{', '.join(names)} not installed" if names else None


def run(peer: Peer, python: str, command: str, *arguments: str, debug: bool = False
        ) -> dict[str, Any]:
    """Run a command of the peer's part in a process of `python`, and return what it prints.

    Raises:
        SettingError: `python` is no interpreter.
        WorkerError: the process failed, or printed no JSON object.
    """
    # What is set for OpenMP would hold for some of the runtimes alone.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    try:
        done = subprocess.run(
            [python, str(Path(__file__).parent), peer.module, command, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=None if debug else subprocess.DEVNULL, env=environment, check=False)
    except OSError:
        raise SettingError(
            f"No Python interpreter is at {python!r}; name one with --peer-python.") from None
    if done.returncode:
        raise WorkerError(
            f"The process of {peer.packages[0]} ended with exit status {done.returncode} "
            f"({command}); run it again with --debug to see why.")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        found = None
    if not isinstance(found, dict):
        raise WorkerError(
            f"The process of {peer.packages[0]} printed no JSON object ({command}); run it again "
            "with --debug to see what it says.")
    return found
