"""A teacher's answers to requests that nobody answered."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cloister.distill.run import encode
from cloister.model.generate import generate
from cloister.progress import silent
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.corpus import Example
    from cloister.model.checkpoint import Checkpoint
    from cloister.progress import Progress

__all__ = ["answered"]

_AT_ONCE = 1024  # requests between two reports of progress


def answered(
    teacher: Checkpoint, requests: Sequence[Example], *, limit: int = 256,
    temperature: float = 0.0, seed: int = 0, progress: Progress = silent,
) -> list[Example]:
    """Return `requests` with the teacher's answers as targets; what was the target is not read.

    Greedy, or sampled at a `temperature`. A request is left out whose answer has no end within
    `limit` tokens and the context, or says nothing.

    Raises:
        TokenizerError, DataError: see `cloister.distill.run.encode`.
    """
    tokenizer = Tokenizer.from_files(teacher.tokenizer_path, teacher.template_path)
    decoder, context = teacher.load(), teacher.metadata.config.shape.context
    rng = torch.Generator().manual_seed(seed)
    asked = encode(teacher, (replace(each, target="?") for each in requests), context)
    prompts = [(prompt, number) for number, (prompt, _) in enumerate(asked.pairs)]
    prompts.sort(key=lambda item: len(item[0]))  # alike in length are generated together
    found: dict[int, Example] = {}
    for at in range(0, len(prompts), _AT_ONCE):
        progress("the teacher answers", at, len(prompts))
        part = prompts[at:at + _AT_ONCE]
        answers = generate(
            decoder, [ids for ids, _ in part], end=teacher.metadata.eos, limit=limit,
            temperature=temperature, rng=rng)
        for (ids, number), answer in zip(part, answers, strict=True):
            text = tokenizer.decode(answer)
            if text.strip() and len(answer) < min(limit, context - len(ids)):
                found[number] = replace(asked.examples[number], target=text)
    progress("the teacher answers", len(prompts), len(prompts))
    return [found[number] for number in sorted(found)]
