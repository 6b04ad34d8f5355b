"""What a teacher says: its answers to requests that nobody answered, and whole conversations."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from cloister import corpus
from cloister.corpus import Example
from cloister.distill.examples import encode
from cloister.errors import DataError, TokenizerError
from cloister.example import CHAT
from cloister.files import whole_file
from cloister.message import Message
from cloister.model.device import device, multiplies_bfloat16
from cloister.model.generate import generate, width
from cloister.progress import silent
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloister.model.checkpoint import Checkpoint
    from cloister.model.transformer import Decoder
    from cloister.progress import Progress

__all__ = ["answered", "kept_samples", "load_to_sample", "samples", "user_begins"]

_AT_ONCE = 1024  # requests between two reports of progress, on a processor
_TEMPERATURE = 0.8  # of both: at 1 a small teacher's words are often none
_REQUEST = 64  # most tokens of a request that a teacher makes up
_ANSWER = 512  # and of its answer to that


def answered(
    teacher: Checkpoint, requests: Sequence[Example], *, limit: int = 256,
    temperature: float = 0.0, seed: int = 0, progress: Progress = silent,
) -> list[Example]:
    """Return `requests` with the teacher's answers as targets; what was the target is not read.

    Greedy, or sampled at a `temperature`. A request is left out whose answer has no end within
    `limit` tokens and the context, or says nothing.

    Raises:
        TokenizerError, DataError: see `cloister.distill.examples.encode`.
    """
    decoder = teacher.load().to(device())
    return _answered(teacher, decoder, requests, limit, temperature, seed, progress)


def _answered(
    teacher: Checkpoint, decoder: Decoder, requests: Sequence[Example], limit: int,
    temperature: float, seed: int, progress: Progress,
) -> list[Example]:
    tokenizer, context = _tokenizer(teacher), teacher.metadata.config.shape.context
    rng = torch.Generator(device()).manual_seed(seed)
    asked = encode(teacher, (replace(each, target="?") for each in requests), context)
    prompts = [(prompt, number) for number, (prompt, _) in enumerate(asked.pairs)]
    prompts.sort(key=lambda item: len(item[0]))  # alike in length are generated together
    found, at_once = dict[int, Example](), _AT_ONCE * width(device())
    for at in range(0, len(prompts), at_once):
        progress("the teacher answers", at, len(prompts))
        part = prompts[at:at + at_once]
        answers = generate(
            decoder, [ids for ids, _ in part], end=teacher.metadata.eos, limit=limit,
            temperature=temperature, rng=rng)
        for (ids, number), answer in zip(part, answers, strict=True):
            text = tokenizer.decode(answer)
            if text.strip() and len(answer) < min(limit, context - len(ids)):
                found[number] = replace(asked.examples[number], target=text)
    progress("the teacher answers", len(prompts), len(prompts))
    return [found[number] for number in sorted(found)]


def samples(
    teacher: Checkpoint, count: int, *, seed: int = 0, progress: Progress = silent
) -> list[Example]:
    """Return up to `count` conversations of one request that `teacher` makes up and answers.

    It begins where the template lets the user speak, and so says what it was taught with (Magpie,
    arXiv 2406.08464). What has no end, says nothing or was asked before is left out.

    Raises:
        TokenizerError: the teacher has no chat template, or see `cloister.distill.examples.encode`.
        DataError: nothing remains.
    """
    if teacher.template_path is None:
        raise TokenizerError(
            f"Checkpoint {teacher.path.name} has no chat template, so there are no conversations "
            "that it could make up; name data to learn from.")
    decoder = load_to_sample(teacher)
    requests = _requests(teacher, decoder, count, seed, progress)
    found = requests and _answered(
        teacher, decoder, requests, _ANSWER, _TEMPERATURE, seed, progress)
    if not found:
        raise DataError(
            f"Of {count} conversations that {teacher.path.name} began it ended none within "
            f"{_REQUEST} and {_ANSWER} tokens; name data to learn from.")
    return found


def load_to_sample(source: Checkpoint) -> Decoder:
    """Read the decoder, in bfloat16 where the device multiplies it: in half the time.

    What it samples comes from nearly the same distribution.
    """
    dtype = torch.bfloat16 if multiplies_bfloat16(device()) else torch.float32
    return source.load(dtype).to(device(), dtype)  # with the rotary tables


def kept_samples(
    teacher: Checkpoint, count: int, folder: Path, *, seed: int, progress: Progress = silent
) -> list[Example]:
    """Return what `samples` gives, kept in `folder`: a run that goes on learns from the same.

    Raises:
        TokenizerError, DataError: see `samples`.
        NotEnoughDisk, OutputUnwritable: see `cloister.files.whole_file`.
    """
    path = folder / f"samples-{teacher.identity[:16]}-{count}-{seed}.jsonl"
    if not path.exists():
        made = samples(teacher, count, seed=seed, progress=progress)
        with whole_file(path) as file:
            file.write("".join(json.dumps(each.to_dict()) + "\n" for each in made).encode())
    return corpus.read(path)


def user_begins(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a conversation up to where the user is to speak."""
    return [id_ for id_, _ in takewhile(
        lambda ids: ids[0] == ids[1], zip(*_spoken(tokenizer, ask=False), strict=False))]


def _user_ends(tokenizer: Tokenizer) -> int | None:
    """Return the first id that the template writes after what the user says, or None."""
    one, other = _spoken(tokenizer, ask=True)
    after = len(list(takewhile(
        lambda ids: ids[0] == ids[1], zip(reversed(one), reversed(other), strict=False))))
    return one[-after] if after else None


def _spoken(tokenizer: Tokenizer, *, ask: bool) -> list[list[int]]:
    """Return the ids of two conversations that differ in what the user says alone."""
    return [tokenizer.encode_chat([Message(role="user", content=text)], add_generation_prompt=ask)
            for text in ("a", "b")]


def _requests(
    teacher: Checkpoint, decoder: Decoder, count: int, seed: int, progress: Progress
) -> list[Example]:
    """Return up to `count` requests, no two alike, that `teacher` makes up."""
    progress("the teacher asks", 0, count)
    tokenizer = _tokenizer(teacher)
    begin, end = user_begins(tokenizer), _user_ends(tokenizer)
    ends = {*teacher.metadata.eos, *(() if end is None else (end,))}
    said = generate(
        decoder, [begin] * count, end=ends, limit=_REQUEST, temperature=_TEMPERATURE,
        rng=torch.Generator(device()).manual_seed(seed))
    texts = dict.fromkeys(
        text for ids in said if len(ids) < _REQUEST and (text := tokenizer.decode(ids).strip()))
    return [
        Example(task=CHAT, input=text, target="", place=f"samples:{number}",
                turns=(Message(role="user", content=text),))
        for number, text in enumerate(texts, start=1)]


def _tokenizer(teacher: Checkpoint) -> Tokenizer:
    return Tokenizer.from_files(teacher.tokenizer_path, teacher.template_path, teacher.metadata)
