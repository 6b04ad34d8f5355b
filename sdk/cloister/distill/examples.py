"""The examples of a run, and the ids that they are to its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister import corpus, pairs
from cloister.errors import DataError, TokenizerError
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cloister.corpus import Example
    from cloister.model.checkpoint import Checkpoint

__all__ = ["SELF", "check_lengths", "encode", "examples_of", "parted"]

SELF = "self"  # data that the model makes itself


def encode(
    source: Checkpoint, examples: Iterable[Example], context: int | None = None
) -> pairs.Encoded:
    """Return examples in the ids of a checkpoint's tokenizer, but those longer than `context`.

    Raises:
        TokenizerError: the checkpoint names no token that ends an answer.
        DataError: none fits.
    """
    if not source.metadata.eos:
        raise TokenizerError(
            f"Checkpoint {source.path.name} names no token that ends an answer; import it anew "
            "from a directory whose generation_config.json does."
        )
    tokenizer = Tokenizer.from_files(
        source.tokenizer_path, source.template_path, source.metadata)
    encoded = pairs.encode(tokenizer, examples, context)
    if encoded.too_long and not encoded.pairs:
        raise DataError(
            f"Every example is longer than the context of {context} tokens (first "
            f"{encoded.places}); shorten them, or name other data.")
    return encoded


def check_lengths(parts: Sequence[pairs.Encoded], tolerated: float) -> tuple[str, ...]:
    """Return the places of the examples that did not fit.

    Raises:
        DataError: they are more than `tolerated`, a share.
    """
    too_long = [each for part in parts for each in part.too_long]
    count = len(too_long) + sum(len(part.pairs) for part in parts)
    if len(too_long) > tolerated * count:
        first = next(part.places for part in parts if part.too_long)
        raise DataError(
            f"Of {count} examples {len(too_long)} are longer than the context (first {first}), "
            f"more than the {tolerated:.0%} tolerated; shorten them or raise the bound.")
    return tuple(place for place, _ in too_long)


def examples_of(data: str | Path | Sequence[Example], tolerate: float) -> list[Example]:
    """Return examples to train on, read by `corpus.load` where a file or directory is named."""
    if isinstance(data, str | Path):
        return list(corpus.load(data, tolerated=tolerate).examples)
    return list(data)


def parted(
    data: str | Path | Sequence[Example], held_out: str | Path | Sequence[Example] | None, *,
    tolerate: float, allow_overlap: bool,
) -> tuple[list[Example], list[Example]]:
    """Return the examples to learn from, and those to measure on.

    Raises:
        DataError: the data cannot be used, or is too little to hold some out.
        OverlapError: what is measured on is also learnt.
    """
    examples = examples_of(data, tolerate)
    if held_out is None:
        examples, measured_on = corpus.split(examples)
    else:
        measured_on = corpus.read(held_out) if isinstance(held_out, str | Path) else list(held_out)
        if not allow_overlap:
            corpus.refuse_overlap(examples, measured_on)
    if not examples or not measured_on:
        raise DataError(
            "There are too few examples to hold some out; add data, or name other examples with "
            "--held-out."
        )
    return examples, measured_on
