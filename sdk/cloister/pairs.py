"""Examples as token ids: what is taught, and what is measured, is the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cloister.errors import ContextExceeded, TokenizerError
from cloister.message import Message

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cloister.corpus import Example
    from cloister.tokenizer import Tokenizer

__all__ = ["Encoded", "Pair", "encode", "pair", "pairs", "request"]

_NAMED = 5  # places in a sentence

Pair = tuple[list[int], list[int]]
"""Ids of a prompt, and of its answer with the end token."""


def request(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """Return a conversation as the template takes it.

    Without a system role the system message stands before the first text of the user.
    """
    if tokenizer.has_system_role or not messages or messages[0].role != "system":
        return list(messages)
    task, *rest = messages
    for place, message in enumerate(rest):
        if message.role == "user":
            rest[place] = replace(message, content=f"{task.content}: {message.content}")
            break
    return rest


def pair(tokenizer: Tokenizer, example: Example) -> Pair:
    """Return the ids of the prompt, up to where the answer begins, and of the answer with its end.

    Both as the chat template lays them out in one go: the answer ends with the token that the
    template writes after it, and begins where the ids part from those of the prompt alone.

    Raises:
        TokenizerError: neither the template nor the model names a token that ends an answer.
    """
    asked = request(tokenizer, example.messages)
    said = [*asked, Message(role="assistant", content=example.target)]
    prompt = tokenizer.encode_chat(asked)
    whole = tokenizer.encode_chat(said, add_generation_prompt=False)
    end = tokenizer.turn_end
    if end is None:
        raise TokenizerError(
            "The model names no token that ends an answer; import it anew from a directory whose "
            "generation_config.json does."
        )
    begin = next(
        (place for place, ids in enumerate(zip(prompt, whole, strict=False)) if ids[0] != ids[1]),
        min(len(prompt), len(whole)),
    )
    answer = whole[begin:]
    last = answer.index(end) if end in answer else len(answer)
    return whole[:begin], [*answer[:last], end]


def pairs(
    tokenizer: Tokenizer, examples: Iterable[Example], context: int, model: str
) -> list[Pair]:
    """Return every example as ids, for `model`, whose name an error says.

    Raises:
        ContextExceeded: an example is longer than `context`; it is named by its place.
        TokenizerError: see `pair`.
    """
    encoded = encode(tokenizer, examples, context)
    if encoded.too_long:
        place, length = encoded.too_long[0]
        raise ContextExceeded(
            f"{place} has {length} tokens and the context of {model} holds {context}; shorten it "
            "or leave it out.")
    return encoded.pairs


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The examples that fit into a context, as ids, and those that do not."""

    examples: list[Example] = field(repr=False)
    pairs: list[Pair] = field(repr=False)  # of each example
    too_long: list[tuple[str, int]]  # place and tokens of each

    @property
    def places(self) -> str:
        """The first places of what is too long."""
        return ", ".join(list(dict.fromkeys(place for place, _ in self.too_long))[:_NAMED])


def encode(
    tokenizer: Tokenizer, examples: Iterable[Example], context: int | None = None
) -> Encoded:
    """Return examples as ids, those apart that are longer than `context`.

    Raises:
        TokenizerError: see `pair`; the example is named by its place.
    """
    encoded = Encoded(examples=[], pairs=[], too_long=[])
    for number, example in enumerate(examples, start=1):
        place = example.place or f"Example {number}"
        try:
            ids = pair(tokenizer, example)
        except TokenizerError as error:
            raise TokenizerError(f"{place}: {error}") from None
        length = len(ids[0]) + len(ids[1])
        if context is not None and length > context:
            encoded.too_long.append((place, length))
        else:
            encoded.examples.append(example)
            encoded.pairs.append(ids)
    return encoded
