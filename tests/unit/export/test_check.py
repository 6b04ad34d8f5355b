"""A right program passes the check whatever its weights, and a wrong one never does."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister import bench
from cloister.errors import ExportMismatch
from cloister.evaluate.divergence import Divergence, compare
from cloister.export import check, write
from cloister.export.golden import MIN_MARGIN, TOKENS, rows
from cloister.model.checkpoint import Checkpoint
from cloister.model.config import ModelConfig
from cloister.model.quantized import QuantizedLinear
from cloister.model.recipe import Recipe
from cloister.model.transformer import Decoder
from cloister.tiers import ladder
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Logits = torch.Tensor


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, list[list[int]]]:
    """Random weights, whose logits have no winners, and the conversations of the check."""
    path = tmp_path_factory.mktemp("random") / "random"
    config = ModelConfig(shape=replace(ladder()["nano-1"], context=96, layers=3))
    bench.random_checkpoint(path, config, Recipe.parse("8da4w-g32"))
    source = Checkpoint.open(path)
    tokenizer = Tokenizer.from_files(source.tokenizer_path, source.template_path)
    return source.load(), check.conversations(tokenizer, 96)


def logits(decoder: Decoder, ids: list[int]) -> Logits:
    with torch.inference_mode():
        found: Logits = decoder(torch.tensor([ids]))[0]
        return found


def test_rounding_passes_where_no_token_wins(
    untrained: tuple[Decoder, list[list[int]]], tmp_path: Path
) -> None:
    """The program itself, whose likeliest token is another in more than one place of a hundred."""
    from cloister.model.checkpoint import Metadata
    from cloister.runtime import _executorch

    decoder, texts = untrained
    metadata = Metadata(name="random", config=decoder.config, recipe="8da4w-g32", eos=(0,))
    entry = write.program(decoder, metadata, tmp_path, chunk=96)
    program = _executorch.load(tmp_path / entry.file, decoder.config.shape.layers, first="score")

    def score(ids: list[int]) -> Logits:
        return program.score(torch.tensor([ids]), 0)[0].clone()

    found = check.check(decoder, score, texts, compare)
    assert found.mean_kld < 1e-3
    assert found.n == sum(map(len, texts))


def swapped(q: Logits) -> Logits:
    return q.view(q.shape[0], -1, 2).flip(-1).reshape(q.shape)


@pytest.mark.parametrize("fault", ["nibbles", "one-layer", "scale", "shifted"])
def test_a_wrong_program_of_untrained_weights_is_refused(
    untrained: tuple[Decoder, list[list[int]]], fault: str
) -> None:
    decoder, texts = untrained
    wrong = copy.deepcopy(decoder)
    layers = [module for module in wrong.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers if fault == "nibbles" else layers[3:4]:
        if fault in ("nibbles", "one-layer"):
            layer.weight.q = swapped(layer.weight.q)
        elif fault == "scale":
            layer.weight.scale = layer.weight.scale * 1.25

    def score(ids: list[int]) -> Logits:
        found = logits(wrong, ids)
        return found.roll(1, 0) if fault == "shifted" else found

    with pytest.raises(ExportMismatch, match="KL divergence"):
        check.check(decoder, score, texts, compare)


def test_what_is_within_the_bounds_costs_one_reading_only(
    untrained: tuple[Decoder, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, texts = untrained
    monkeypatch.setattr(check, "_rounded", None)  # never asked for
    found = check.check(decoder, functools.partial(logits, decoder), texts[:16], compare)
    assert isinstance(found, Divergence)
    assert found.top1 > 0.99


def test_conversations_are_cut_to_the_context(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja"
    )
    whole = check.conversations(tokenizer, 10_000)
    assert sum(map(len, whole)) >= check.TOKENS
    short = check.conversations(tokenizer, 32)
    assert {len(ids) for ids in short} == {32}
    assert len(short) > len(whole)
    assert short[0] == whole[0][:32]


def test_golden_rows_end_where_no_token_wins_or_the_answer_does() -> None:
    answers = {1: [(7, 0.9), (8, MIN_MARGIN / 2)], 2: [(7, 0.5), (0, 0.25), (9, 3.0)],
               3: [(7, 0.01)], 4: [(7, 1.0)] * 100, 5: [(7, 0.3)]}
    found = rows([[number] for number in answers], lambda ids: answers[ids[0]], eos=(0,))
    assert [(row.prompt, len(row.tokens), row.margin) for row in found] == [
        ((1,), 1, 0.9), ((2,), 2, 0.25), ((4,), TOKENS, 1.0), ((5,), 1, 0.3)]
