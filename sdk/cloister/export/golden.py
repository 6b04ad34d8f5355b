"""Golden rows: prompts whose greedy answers have a clear winner at every step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cloister.bundle import Golden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["MIN_MARGIN", "PROMPTS", "margin", "rows"]

MIN_MARGIN = 0.05  # logits
_SIGMAS = 4.0
TOKENS = 32
# Of what is said anew most models are not sure; of what goes on as it began they are.
PROMPTS = (
    ("Say something about the sea.", ""), ("What is seven times eight?", ""),
    ("Name three colours.", ""), ("Tell me a short story.", ""), ("Who are you?", ""),
    ("Write a haiku about rain.", ""),
    ("Count from 1 to 40.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"),
    ("Say the alphabet.", "A B C D E F G H I J K L"),
    ("Name the days of two weeks.", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, "
                                    "Sunday, Monday, Tuesday,"),
    ("Write one line six times.", "The ferry leaves at noon.\nThe ferry leaves at noon.\n"
                                  "The ferry leaves at noon.\n"),
)
"""What is asked, and how the answer begins."""


def margin(mean_kld: float) -> float:
    """Return by how much the best logit must lead where rounding costs `mean_kld` nats a token.

    Processors and builds round otherwise, as a program does and its checkpoint. Noise in the logits
    of variance v costs v / 2 nats to second order, and moves the gap of two by 2 v: a standard
    deviation of 2 sqrt(mean_kld), which is also what was found on SmolLM2-135M (0.4 at 0.035).
    """
    return max(MIN_MARGIN, _SIGMAS * 2 * math.sqrt(mean_kld))


def rows(
    prompts: Iterable[list[int]], answer: Callable[[list[int]], Iterable[tuple[int, float]]],
    eos: tuple[int, ...], least: float = MIN_MARGIN
) -> list[Golden]:
    """Return the greedy answers to `prompts`, as far as the best logit leads by `least`.

    `answer` gives the ids that follow a prompt until the context is full, each with the gap
    between the two best logits.
    """
    golden = []
    for prompt in prompts:
        tokens: list[int] = []
        lead = float("inf")
        for token, gap in answer(prompt):
            if gap < least:
                break
            lead = min(lead, gap)
            tokens.append(token)
            if token in eos or len(tokens) == TOKENS:
                break
        if tokens:
            golden.append(Golden(
                prompt=tuple(prompt), tokens=tuple(tokens), margin=round(lead, 4)
            ))
    return golden
