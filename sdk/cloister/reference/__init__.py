"""The shipped reference family, and the program that builds it."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cloister.family import bundle_path, checkpoint_path, find, find_checkpoint

__all__ = ["bundle_path", "checkpoint_path", "encoder_path", "find", "find_checkpoint",
           "requests_path", "tools", "word_lists"]


def encoder_path(name: str) -> Path:
    """Return the folder of a trained encoder, `ears` or `eyes`, in a checkout of the project.

    What is installed has the family alone, whose bundles hold both.
    """
    return _directory() / "encoders" / name


def requests_path() -> Path:
    """Return the path of requests to try the family on, JSON lines of system and prompt."""
    return _directory() / "requests.jsonl"


def tools() -> list[dict[str, Any]]:
    """Read the seven tools of the task `call`, each with its arguments in SNIPS."""
    tools: list[dict[str, Any]] = json.loads((_directory() / "tools.json").read_text("utf-8"))
    return tools


@cache
def word_lists(name: str) -> dict[str, Any]:
    """Read the word lists that the generator `name` of training data draws from."""
    lists: dict[str, Any] = json.loads((_directory() / f"{name}.json").read_text("utf-8"))
    return lists


def _directory() -> Path:
    return Path(str(resources.files("cloister.reference")))
