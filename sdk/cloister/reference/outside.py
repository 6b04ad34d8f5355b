"""Requests that fall outside every intent: everyday questions out of frames and words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cloister.reference import word_lists

if TYPE_CHECKING:
    import random

__all__ = ["request"]


def request(rng: random.Random) -> str:
    """Draw one of tens of thousands of requests, in lower case as the data set's own are."""
    lists = word_lists("outside")
    text = re.sub(
        r"\{(\w+)\}", lambda match: rng.choice(lists["words"][match[1]]),
        rng.choice(lists["frames"]),
    )
    draw = rng.random()
    if draw < 0.1:
        return str(rng.choice(lists["before"])) + text
    return text + rng.choice(lists["after"]) if draw < 0.2 else text
