"""Golden rows: prompts whose greedy answers have a clear winner at every step."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from cloister.bundle import Golden, Pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Literal

__all__ = ["MIN_MARGIN", "PROMPTS", "margin", "media_row", "rows"]

MIN_MARGIN = 0.05  # logits
_SIGMAS = 4.0
TOKENS = 32
_MEDIA_TOKENS = 8
_SEEDS, _WOBBLES = 4, 4
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


def media_row(
    kind: Literal["picture", "recording"], prompts: Sequence[list[int]],
    answer: Callable[[Pattern, int, list[int]], Iterable[tuple[int, float]]],
    eos: tuple[int, ...], least: float = MIN_MARGIN,
) -> Golden | None:
    """Return a golden row of a picture or recording of noise before one of `prompts`.

    `answer` gives what follows a pattern, wobbled, and a prompt (see `rows`). Encoders round
    otherwise on other processors, too: only as much of an answer is kept as comes whatever the
    wobble. It is the longest of all; None where there is nothing of which the model is as sure.
    """
    best: Golden | None = None
    for seed, prompt in itertools.product(range(_SEEDS), prompts):
        media = Pattern(kind=kind, seed=seed)
        found = [_answers(answer, media, wobble, prompt, eos, least) for wobble in range(_WOBBLES)]
        same = itertools.takewhile(
            lambda ids: len(set(ids)) == 1, zip(*(row.tokens for row in found), strict=False))
        tokens = tuple(ids[0] for ids in same)
        if tokens and (best is None or len(tokens) > len(best.tokens)):
            lead = min(row.margin for row in found)
            best = Golden(prompt=tuple(prompt), tokens=tokens, margin=lead, media=media)
        if best is not None and len(best.tokens) == _MEDIA_TOKENS:
            break
    return best


def _answers(
    answer: Callable[[Pattern, int, list[int]], Iterable[tuple[int, float]]], media: Pattern,
    wobble: int, prompt: list[int], eos: tuple[int, ...], least: float,
) -> Golden:
    """Return the row of one wobble, without tokens where nothing is sure."""
    def begun(ids: list[int]) -> Iterable[tuple[int, float]]:
        return itertools.islice(answer(media, wobble, ids), _MEDIA_TOKENS)

    found = rows([prompt], begun, eos, least)
    return found[0] if found else Golden(prompt=tuple(prompt), tokens=(), margin=0.0)
