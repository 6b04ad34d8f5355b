"""What a program lost is measured against checkpoint and parent; golden rows have clear winners."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister import bench
from cloister.errors import ExportMismatch
from cloister.evaluate.divergence import compare
from cloister.export import check
from cloister.export.golden import MIN_MARGIN, TOKENS, margin, rows
from cloister.export.parts import Gap
from cloister.export.streamed import streamed
from cloister.model.checkpoint import Checkpoint, plan
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.model.transformer import initial_weights
from cloister.model.writer import CheckpointWriter
from cloister.tiers import ladder
from cloister.tokenizer import Tokenizer

CONFIG = ModelConfig(shape=replace(ladder()["nano-1"], context=96, layers=3))


@pytest.fixture(scope="module", params=["quantized", "plain, tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("checkpoint") / "random"
    if request.param == "quantized":
        bench.random_checkpoint(path, CONFIG, Recipe.parse("8da4w-g32"))
        return Checkpoint.open(path)
    config = replace(CONFIG, shape=replace(CONFIG.shape, tied=True))
    bench.random_checkpoint(path.with_name("q"), config, Recipe.parse("8da4w-g32"))
    other = Checkpoint.open(path.with_name("q"))
    metadata = replace(other.metadata, config=config, recipe=None)
    with CheckpointWriter(
        path, metadata=metadata, tensors=plan(config, None, torch.bfloat16),
        tokenizer=other.tokenizer_path, template=other.template_path,
    ) as writer:
        for name, value in initial_weights(config, 0):
            writer.add(name, value.bfloat16())
    return Checkpoint.open(path)


def texts_of(source: Checkpoint) -> list[list[int]]:
    tokenizer = Tokenizer.from_files(source.tokenizer_path, source.template_path)
    return check.conversations(tokenizer, 96, 300)


def test_conversations_read_together_give_what_each_gives_alone(source: Checkpoint) -> None:
    decoder, texts = source.load(), texts_of(source)
    assert len(texts) > 1
    for got, ids in zip(check.Reading(decoder, texts), texts, strict=True):
        with torch.inference_mode():
            expected = decoder(torch.tensor([ids]))[0]
        # Activations may round otherwise; a text that saw another's tokens would be all wrong.
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_a_streamed_decoder_gives_the_same_and_keeps_no_weights(source: Checkpoint) -> None:
    decoder, texts = streamed(source), texts_of(source)[:2]
    for ours, theirs in zip(
        check.Reading(decoder, texts), check.Reading(source.load(), texts), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert all(tensor.is_meta for tensor in decoder.state_dict().values())


def noisy(logits: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return logits + size * torch.randn(logits.shape, generator=rng)


def measured(program_noise: float, *, known: bool = True) -> check.Divergences:
    """What a program loses beside a checkpoint that is 0.3 off its parent in every logit."""
    rng = torch.Generator().manual_seed(0)
    parent = [torch.randn(40, 50, generator=rng) for _ in range(5)]
    texts = [[number] for number in range(5)]
    return check.measure(
        lambda ids: noisy(parent[ids[0]], program_noise, 10 + ids[0]), texts,
        [noisy(logits, 0.3, number) for number, logits in enumerate(parent)], compare,
        parent if known else None,
    )


def test_a_program_may_differ_from_its_checkpoint_as_both_do_from_their_parent() -> None:
    found = measured(0.3)
    assert found.program_from_parent is not None
    assert found.checkpoint_from_parent is not None
    ratio = found.program_from_parent.mean_kld / found.checkpoint_from_parent.mean_kld
    assert 0.8 < ratio < 1.25
    assert found.program_from_checkpoint.mean_kld > found.program_from_parent.mean_kld


@pytest.mark.parametrize("noise", [1.0, float("nan")])
def test_a_program_that_lost_more_than_its_checkpoint_is_refused(noise: float) -> None:
    with pytest.raises(ExportMismatch, match="nats a token from the unquantized model"):
        measured(noise)


def test_without_the_parent_figures_are_recorded_and_the_reason() -> None:
    found = measured(1.0, known=False)
    for parent, reason in (
        (None, "the checkpoint names no parent"),
        ("ab12", "the parent's weights are not beside the checkpoint"),
    ):
        record = check.CheckReport(
            parts=9, worst=Gap("head", 1e-6), constants_bytes=5, divergences=found, parent=parent,
        ).to_dict()
        assert record["against_parent"] == {"parent": parent, "reason": reason}
        between = found.program_from_checkpoint
        assert record["program_against_checkpoint"] == {
            **between.to_dict(), "histogram": between.histogram}
        assert sum(between.histogram.values()) == between.to_dict()["n"] == 200


def test_a_large_model_is_measured_on_fewer_tokens() -> None:
    assert check.tokens_for(100_000_000) == check.TOKENS
    assert check.LEAST_TOKENS < check.tokens_for(1_800_000_000) < check.TOKENS / 4
    assert check.tokens_for(70_000_000_000) == check.LEAST_TOKENS


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


def test_the_coarser_the_rounding_the_more_a_golden_token_must_lead() -> None:
    """What was found on a real model: 0.4 of standard deviation at 0.035 nats."""
    assert margin(0.0) == margin(1e-6) == MIN_MARGIN
    assert margin(0.035) == pytest.approx(4 * 0.4, rel=0.1)
    found = rows([[1]], lambda ids: [(7, 2.0), (8, 1.5), (9, 3.0)], eos=(0,), least=margin(0.05))
    assert [row.tokens for row in found] == [(7,)]


def test_parts_are_compared_on_different_tokens_even_where_the_tokenizer_knows_no_word() -> None:
    assert check.distinct([list(range(20)), [3]], 50) == [*range(20), 3]
    unknown = check.distinct([[7] * 30, [7] * 70], 50)
    assert len(unknown) == 100
    assert len(set(unknown)) > 30
    assert max(unknown) < 50
    assert check.distinct([[0, 1, 2]], 3) == [0, 1, 2]
