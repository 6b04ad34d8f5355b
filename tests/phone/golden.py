"""Golden answers of a bundle as texts, which is what ExecuTorch's runners take and give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers

from cloister.bundle import Bundle


@dataclass(frozen=True)
class Spoken:
    """A prompt, and what greedy decoding says to it: the token that ends it is spelled, too."""

    prompt: str
    answer: str
    tokens: int  # of the answer


def spoken(bundle: Bundle) -> list[Spoken]:
    """Return the golden answers whose prompts the tokenizer reads back as the ids they were."""
    rows = [(row.prompt, row.tokens) for row in bundle.golden()]
    return _spoken(bundle, rows)


def continuations(bundle: Bundle) -> list[Spoken]:
    """Return each token of the golden answers, after a prompt that has those before it.

    Where rounding moves the most likely token, one difference ends an answer and not its rest.
    """
    return _spoken(bundle, [
        ((*row.prompt, *row.tokens[:at]), row.tokens[at:at + 1])
        for row in bundle.golden() for at in range(len(row.tokens))])


def _spoken(bundle: Bundle, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Spoken]:
    plain = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
    plain.no_truncation()
    found = []
    for ids, tokens in rows:
        prompt, answer = (
            plain.decode(list(each), skip_special_tokens=False) for each in (ids, tokens))
        if plain.encode(prompt, add_special_tokens=False).ids == list(ids):
            found.append(Spoken(prompt, answer, len(tokens)))
    return found
