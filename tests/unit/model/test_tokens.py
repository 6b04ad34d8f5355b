"""The ids of a prompt are those that the model's makers meant, which is what transformers gives.

A thousand conversations for each style:

    python -m pytest -m campaign tests/unit/model/test_tokens.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tests.unit.model.spoken import NO_SYSTEM, STYLES, conversation, write

from cloister.message import Message
from cloister.model import tokens
from cloister.tokenizer import Tokenizer

ROWS = 1000


def ours(directory: Path) -> Tokenizer:
    read = tokens.read(directory, ROWS)
    return Tokenizer(
        tokenizers.Tokenizer.from_str(read.tokenizer), read.template,
        special_tokens=read.special_tokens, eos=read.eos)


def theirs(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("count", [
    40, pytest.param(1000, marks=[pytest.mark.campaign, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("style", STYLES)
def test_every_conversation_has_the_ids_that_transformers_gives_it(
    tmp_path: Path, style: str, count: int
) -> None:
    directory = write(tmp_path, style)
    mine, reference = ours(directory), theirs(directory)
    rng = random.Random(style)
    differing = []
    for _ in range(count):
        said = conversation(rng, system=style not in NO_SYSTEM)
        answer = said[-1]["role"] != "assistant"
        wanted = reference.apply_chat_template(
            said, add_generation_prompt=answer, return_dict=False)
        got = mine.encode_chat(
            [Message(**turn) for turn in said], add_generation_prompt=answer)
        if got != wanted:
            differing.append((said, got, wanted))
    assert not differing, f"{len(differing)} of {count} differ (seed {style!r}): {differing[0]}"
