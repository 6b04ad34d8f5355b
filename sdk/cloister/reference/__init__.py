"""The shipped reference family, and the program that builds it."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cloister.family import bundle_path, checkpoint_path, find, find_checkpoint

__all__ = ["bundle_path", "checkpoint_path", "find", "find_checkpoint", "requests_path",
           "tools", "word_lists"]


def requests_path() -> Path:
    """Requests to try the family on, as JSON lines of system and prompt."""
    return _directory() / "requests.jsonl"


def tools() -> list[dict[str, Any]]:
    """The seven tools of the task `call`, each with the arguments that SNIPS knows."""
    found: list[dict[str, Any]] = json.loads((_directory() / "tools.json").read_text("utf-8"))
    return found


@cache
def word_lists(name: str) -> dict[str, Any]:
    """What the generator of training data `name` draws from."""
    lists: dict[str, Any] = json.loads((_directory() / f"{name}.json").read_text("utf-8"))
    return lists


def _directory() -> Path:
    return Path(str(resources.files("cloister.reference")))
