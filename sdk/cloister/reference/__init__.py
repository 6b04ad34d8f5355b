"""The shipped reference family, and the program that builds it."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cloister.errors import SettingError
from cloister.tiers import Scale, Tier

__all__ = ["bundle_path", "checkpoint_path", "find", "find_checkpoint", "requests_path",
           "tools", "word_lists"]


def bundle_path(tier: str, family: Path | None = None) -> Path:
    """Where the bundle of `tier` lies, in the package or in the directory `family`."""
    return (family or _directory() / "family") / f"{tier}.cloister"


def checkpoint_path(tier: str) -> Path:
    """Where the unquantized checkpoint of `tier` lies."""
    return _directory() / "checkpoints" / tier


def find_checkpoint(name: str) -> Path:
    """The checkpoint at `name`, or the one of that tier which the package ships.

    Raises:
        SettingError: neither.
    """
    for path in (Path(name), checkpoint_path(name)):
        if path.is_dir():
            return path
    raise SettingError(f"No checkpoint is named {Path(name).name!r}; name a directory of one.")


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


def find(name: str, family: Path | None = None) -> Path:
    """The bundle or checkpoint called `name`: a directory, or the bundle of a tier of the family.

    Raises:
        SettingError: neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in list(Tier):
        path = bundle_path(name, family)
        if path.is_dir():
            return path
        raise SettingError(
            f"The family has no {name} (at {Scale.REFERENCE} size); name a bundle instead."
        )
    raise SettingError(
        f"No bundle or tier is named {Path(name).name!r}; tiers are {', '.join(Tier)}."
    )
