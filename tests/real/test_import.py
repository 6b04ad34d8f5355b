"""A model that others made comes in whole: its weights, its ids, its answers."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from tests.real import smollm2

from cloister.export import phone
from cloister.message import Message
from cloister.model.checkpoint import Checkpoint
from cloister.model.generate import generate
from cloister.model.imports import import_model
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TEXTS = (
    "The capital of France is Paris, and seven times eight is 56.",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\nprint(fib(30))  # slow",
    "Na\u00efve caf\u00e9s: \u4f60\u597d, \u0645\u0631\u062d, \U0001f980\U0001f980!  Two  spaces,\t"
    "tabs\r\nand 3.14159.",
)
QUESTIONS = (
    "What is the capital of France?", "What is 7 times 8?", "Tell me a story about a fox.",
    "Write a Python function that reverses a list.",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_model(smollm2.path(), tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_files(
        checkpoint.tokenizer_path, checkpoint.template_path, checkpoint.metadata)


def texts(count: int = 400) -> list[str]:
    rng = random.Random(7)
    words = ("the", "quick", "Fox's", "don't", "1,234.5", "caf\u00e9", "cafe\u0301",
             "\u4f60\u597d", "x**2", "<b>", "\U0001f469\u200d\U0001f680", "\u0661\u0662", "\u00bd")
    gaps = (" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "")
    wild = [chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xA0, 0xD800),
                            rng.randrange(0x10000, 0x1FA00)))) for _ in range(500)]
    return [
        "".join(rng.choice(words if rng.random() < 0.7 else wild) + rng.choice(gaps)
                for _ in range(rng.randint(1, 40)))
        for _ in range(count)
    ]


def test_the_import_takes_less_than_ten_seconds_and_says_what_the_file_was(
    tmp_path: Path,
) -> None:
    begin = time.process_time()
    imported = import_model(smollm2.path(), tmp_path / "out")
    assert time.process_time() - begin < 10
    assert imported.metadata.origin is not None
    assert imported.metadata.origin.types == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    shape = imported.metadata.config.shape
    assert (shape.layers, shape.heads, shape.kv_heads, shape.tied) == (30, 9, 3, True)
    assert (imported.metadata.bos, imported.metadata.eos) == (1, (2,))


@torch.inference_mode()
def test_logits_are_those_that_transformers_reads_from_the_same_file(
    checkpoint: Checkpoint,
) -> None:
    model, their_tokenizer = smollm2.theirs()
    ours = checkpoint.load()
    for text in TEXTS:
        tokens = torch.tensor([their_tokenizer(text)["input_ids"]])
        assert (ours(tokens) - model(tokens).logits).abs().max() <= 1e-4


def test_ids_are_those_of_its_tokenizer(tokenizer: Tokenizer) -> None:
    _, theirs = smollm2.theirs()
    for text in (*TEXTS, *QUESTIONS, *texts()):
        assert tokenizer.encode(text) == theirs(text)["input_ids"], ascii(text)


@pytest.mark.parametrize("system", [None, "You are brief."])
def test_a_conversation_has_the_ids_of_its_template(
    tokenizer: Tokenizer, system: str | None
) -> None:
    _, theirs = smollm2.theirs()
    said = [("user", QUESTIONS[0]), ("assistant", "Paris."), ("user", "And of  Spain?\n")]
    if system is not None:
        said.insert(0, ("system", system))
    wanted = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in said],
        add_generation_prompt=True, return_dict=False)
    messages = [Message(role=role, content=content) for role, content in said]
    assert tokenizer.encode_chat(messages) == wanted


@torch.inference_mode()
def test_greedy_answers_are_its_own(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    model, theirs = smollm2.theirs()
    prompts = [tokenizer.encode_chat([Message(role="user", content=question)])
               for question in QUESTIONS]
    answers = generate(checkpoint.load(), prompts, end=checkpoint.metadata.eos, limit=32)
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=2)
        said = wanted[0, len(prompt):].tolist()
        assert answer == (said[:said.index(2)] if 2 in said else said)
        assert tokenizer.decode(answer) == theirs.decode(answer)
    assert "Paris" in tokenizer.decode(answers[0])


def test_phones_read_the_same_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    assert phone.complaint(checkpoint.tokenizer_path, tokenizer, QUESTIONS) is None
