"""Examples as token ids: what is taught, and what is measured, is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.errors import ContextExceeded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cloister.corpus import Example
    from cloister.tokenizer import Tokenizer

__all__ = ["Pair", "pair", "pairs"]

Pair = tuple[list[int], list[int]]
"""Ids of a prompt, and of its answer with the end token."""


def pair(tokenizer: Tokenizer, example: Example, end: int) -> Pair:
    """Return the ids of the prompt, up to where the answer begins, and of the answer with `end`."""
    return tokenizer.encode_chat(example.messages), [*tokenizer.encode(example.target), end]


def pairs(
    tokenizer: Tokenizer, examples: Iterable[Example], end: int, context: int, model: str
) -> list[Pair]:
    """Return every example as ids, for `model`, whose name an error says.

    Raises:
        ContextExceeded: an example is longer than `context`; it is named by its place.
    """
    made = []
    for number, example in enumerate(examples, start=1):
        prompt, answer = pair(tokenizer, example, end)
        if len(prompt) + len(answer) > context:
            raise ContextExceeded(
                f"{example.place or f'Example {number}'} has {len(prompt) + len(answer)} tokens "
                f"and the context of {model} holds {context}; shorten it or leave it out."
            )
        made.append((prompt, answer))
    return made
