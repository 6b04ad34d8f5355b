"""Golden answers of a bundle as texts, which is what ExecuTorch's runners take and give."""

from __future__ import annotations

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
    plain = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
    plain.no_truncation()
    found = []
    for row in bundle.golden():
        prompt, answer = (
            plain.decode(list(ids), skip_special_tokens=False) for ids in (row.prompt, row.tokens))
        if tuple(plain.encode(prompt, add_special_tokens=False).ids) == row.prompt:
            found.append(Spoken(prompt, answer, len(row.tokens)))
    return found
