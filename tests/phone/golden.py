"""Golden answers of a bundle as texts, which is what ExecuTorch's runners take and give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers

from cloister.bundle import Bundle, Golden


@dataclass(frozen=True)
class Spoken:
    """A prompt, and what greedy decoding says to it: the token that ends it is spelled, too."""

    prompt: str
    answer: str
    tokens: int  # of the answer
    margin: float  # smallest gap between its two best logits, where the bundle was made


def same(asked: Sequence[Spoken | Golden], found: Sequence[bool]) -> str:
    """Return how many were answered the same, and by how little the others could be otherwise."""
    others = [row.margin for row, right in zip(asked, found, strict=True) if not right]
    turned = f" (the others' margins are up to {max(others):.2f})" if others else ""
    return f"{sum(found)} of {len(found)}{turned}"


def spoken(bundle: Bundle) -> list[Spoken]:
    """Return the golden answers whose prompts the tokenizer reads back as the ids they were."""
    return _spoken(bundle, bundle.golden())


def continuations(bundle: Bundle) -> list[Spoken]:
    """Return each token of the golden answers, after a prompt that has those before it.

    Where rounding moves the most likely token, one difference ends an answer and not its rest.
    """
    return _spoken(bundle, [
        Golden((*row.prompt, *row.tokens[:at]), row.tokens[at:at + 1], row.margin)
        for row in bundle.golden() for at in range(len(row.tokens))])


def _spoken(bundle: Bundle, rows: Sequence[Golden]) -> list[Spoken]:
    plain = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
    plain.no_truncation()
    found = []
    for row in rows:
        prompt, answer = (
            plain.decode(list(ids), skip_special_tokens=False) for ids in (row.prompt, row.tokens))
        if tuple(plain.encode(prompt, add_special_tokens=False).ids) == row.prompt:
            found.append(Spoken(prompt, answer, len(row.tokens), row.margin))
    return found
