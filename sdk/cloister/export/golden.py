"""Golden rows: prompts whose greedy answers have a clear winner at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.bundle import Golden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["MIN_MARGIN", "PROMPTS", "rows"]

MIN_MARGIN = 0.05  # logits; rounding differs between processors by less
TOKENS = 32
PROMPTS = (
    "Say something about the sea.", "What is seven times eight?", "Name three colours.",
    "Tell me a short story.", "Who are you?", "Write a haiku about rain.",
)


def rows(
    prompts: Iterable[list[int]], answer: Callable[[list[int]], Iterable[tuple[int, float]]],
    eos: tuple[int, ...]
) -> list[Golden]:
    """Return the greedy answers to `prompts`, as far as the best logit leads by MIN_MARGIN.

    `answer` gives the ids that follow a prompt until the context is full, each with the gap
    between the two best logits.
    """
    golden = []
    for prompt in prompts:
        tokens: list[int] = []
        margin = float("inf")
        for token, gap in answer(prompt):
            if gap < MIN_MARGIN:
                break
            margin = min(margin, gap)
            tokens.append(token)
            if token in eos or len(tokens) == TOKENS:
                break
        if tokens:
            golden.append(Golden(
                prompt=tuple(prompt), tokens=tuple(tokens), margin=round(margin, 4)
            ))
    return golden
