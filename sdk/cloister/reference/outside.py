"""Requests that fall outside every intent: everyday questions out of frames and words."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

__all__ = ["request"]


@cache
def _lists() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("outside.json").read_text("utf-8")
    lists: dict[str, Any] = json.loads(text)
    return lists


def request(chance: random.Random) -> str:
    """One of tens of thousands, in lower case as the data set's own are."""
    lists = _lists()
    text = re.sub(
        r"\{(\w+)\}", lambda match: chance.choice(lists["words"][match[1]]),
        chance.choice(lists["frames"]),
    )
    draw = chance.random()
    if draw < 0.1:
        return str(chance.choice(lists["before"])) + text
    return text + chance.choice(lists["after"]) if draw < 0.2 else text
