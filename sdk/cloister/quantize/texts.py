"""The texts that a quantization is calibrated on: what the model says itself, or data."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING

import torch

from cloister.distill.answers import load_to_sample, user_begins
from cloister.distill.examples import SELF, encode, examples_of
from cloister.errors import DataError
from cloister.model.device import device
from cloister.model.generate import generate, width
from cloister.progress import silent
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloister.corpus import Example
    from cloister.model.checkpoint import Checkpoint
    from cloister.progress import Progress

__all__ = ["calibration_texts", "most"]

COUNT = 128  # with 64 the divergence of SmolLM2-135M is a tenth larger, with 512 a tenth smaller
ON_CUDA = 4  # times as many there, where they cost next to nothing
LEAST = 32
WORK = 64e9  # parameters times texts: larger models have fewer, for time and memory
LENGTH = 256  # tokens
_BATCH = 128  # texts that are sampled between two reports of progress, on a processor


def calibration_texts(
    source: Checkpoint, given: str | Path | Sequence[Example], *,
    count: int | None = None, progress: Progress = silent,
) -> list[list[int]]:
    """Return texts as ids, at most `count` (by default what `most` says) of LENGTH tokens each.

    With `SELF` the model samples them: one half begins as its conversations do, where the user is
    to speak, the other with a random token (LLM-QAT, arXiv 2305.17888). Otherwise they are the
    examples, or those in the files at a path, prompts and answers one after another.

    Raises:
        DataError: the data cannot be used, or is too little for one text.
        TokenizerError: see `cloister.distill.examples.encode`.
    """
    shape = source.metadata.config.shape
    length, count = min(LENGTH, shape.context), count or most(shape.parameters)
    if given == SELF:
        return _sampled(source, length, count, progress)
    encoded = encode(source, examples_of(given, tolerate=0.05))
    ids = list(chain.from_iterable(prompt + answer for prompt, answer in encoded.pairs))
    texts = [ids[at:at + length] for at in range(0, len(ids) - length + 1, length)]
    if not texts:
        raise DataError(
            f"The data to calibrate on holds {len(ids)} tokens, and {length} are the least; name "
            "more, or calibrate on the model's own texts."
        )
    return texts[::math.ceil(len(texts) / count)]


def most(parameters: int) -> int:
    """Return how many texts a model of so many parameters is calibrated on."""
    count = min(COUNT, max(LEAST, int(WORK / parameters)))
    return count * ON_CUDA if device().type == "cuda" else count


def _sampled(
    source: Checkpoint, length: int, count: int, progress: Progress
) -> list[list[int]]:
    tokenizer = Tokenizer.from_files(
        source.tokenizer_path, source.template_path, source.metadata)
    rng = torch.Generator(device()).manual_seed(0)
    chat = user_begins(tokenizer)[:length - 1]
    begin = [] if source.metadata.bos is None else [source.metadata.bos]
    random = torch.randint(
        tokenizer.vocab_size, (count // 2,), generator=rng, device=device()).tolist()
    starts = [start for id_ in random for start in (chat or [id_], [*begin, id_])]
    decoder, made, batch = load_to_sample(source), list[list[int]](), _BATCH * width(device())
    for first in range(0, count, batch):
        progress("sample texts", first, count)
        group = starts[first:first + batch]
        said = generate(decoder, group, end=(), limit=length, temperature=1.0, rng=rng)
        made += [[*start, *ids][:length] for start, ids in zip(group, said, strict=True)]
    progress("sample texts", count, count)
    return made
