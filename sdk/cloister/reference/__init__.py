"""The shipped reference family, and the program that builds it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["bundle_path", "checkpoint_path", "requests_path"]


def bundle_path(tier: str, family: Path | None = None) -> Path:
    """Where the bundle of `tier` lies, in the package or in the directory `family`."""
    return (family or _directory() / "family") / f"{tier}.cloister"


def checkpoint_path(tier: str) -> Path:
    """Where the unquantized checkpoint of `tier` lies."""
    return _directory() / "checkpoints" / tier


def requests_path() -> Path:
    """Requests to try the family on, as JSON lines of system and prompt."""
    return _directory() / "requests.jsonl"


def _directory() -> Path:
    return Path(str(resources.files("cloister.reference")))
