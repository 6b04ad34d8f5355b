"""Answers of many prompts are those that each would get alone."""

from __future__ import annotations

import pytest
import torch

from cloister.model import generate as module
from cloister.model.config import ModelConfig
from cloister.model.generate import generate
from cloister.model.transformer import Decoder
from cloister.tiers import Shape

SHAPE = Shape(
    vocab_size=24, hidden_size=32, layers=2, heads=2, kv_heads=1, head_size=16,
    feed_forward=48, context=40, tied=False,
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder(ModelConfig(shape=SHAPE)).eval()
    made.initialize(0)
    with torch.no_grad():  # answers that vary from prompt to prompt
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.mul_(12)
    return made


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [torch.randint(24, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def alone(decoder: Decoder, prompt: list[int], end: tuple[int, ...], limit: int) -> list[int]:
    """Greedy decoding by its definition: no cache, no batch."""
    ids = list(prompt)
    while len(ids) - len(prompt) < limit and len(ids) < SHAPE.context:
        token = int(decoder(torch.tensor([ids]))[0, -1].argmax())
        if token in end:
            break
        ids.append(token)
    return ids[len(prompt):]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 20_000, 512 << 20])
def test_greedy_answers_do_not_depend_on_company(
    decoder: Decoder, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", budget)
    asked = prompts(60)
    wanted = [alone(decoder, prompt, (3, 4), 12) for prompt in asked]
    lengths = {len(answer) for answer in wanted}
    assert 12 in lengths and len(lengths) > 3, "some should end early, some not"
    assert generate(decoder, asked, end=(3, 4), limit=12) == wanted


def test_an_answer_ends_where_the_context_is_full(decoder: Decoder) -> None:
    (answer,) = generate(decoder, [[5] * 35], end=(), limit=100)
    assert len(answer) == 5
    assert generate(decoder, [[5] * 40], end=(), limit=100) == [[]]


def test_a_batch_is_as_large_as_its_memory_allows(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 6 tokens: 24 * 4 bytes of logits, 10 * 2 * 2 * 16 * 4 of keys and values."""
    row_bytes = 24 * 4 + 10 * 2 * 2 * 16 * 4
    monkeypatch.setattr(module, "BATCH_BYTES", 7 * row_bytes + 1)
    sizes = []
    handle = decoder.embed.register_forward_hook(
        lambda _, given, out: sizes.append(tuple(given[0].shape)))
    try:
        generate(decoder, [[1, 2, 3, 4, 5, 6]] * 20, end=(), limit=4)
    finally:
        handle.remove()
    assert [rows for rows, length in sizes if length == 6] == [7, 7, 6]


def test_sampling_follows_the_model_and_its_generator(decoder: Decoder) -> None:
    def drawn(seed: int, temperature: float) -> list[int]:
        rng = torch.Generator().manual_seed(seed)
        answers = generate(
            decoder, [[7, 8, 9]] * 4000, end=(), limit=1, temperature=temperature,
            rng=rng,
        )
        return [token for (token,) in answers]

    assert drawn(1, 1.0) == drawn(1, 1.0) != drawn(2, 1.0)
    for temperature in (0.5, 2.0):
        with torch.no_grad():
            chances = (decoder(torch.tensor([[7, 8, 9]]))[0, -1] / temperature).softmax(-1)
        shares = torch.bincount(torch.tensor(drawn(3, temperature)), minlength=24) / 4000
        bound = 5 * (chances * (1 - chances) / 4000).sqrt() + 1e-3  # five standard errors
        assert bool(((shares - chances).abs() < bound).all())
