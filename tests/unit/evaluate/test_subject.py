"""A bundle and the checkpoint it was made of are one model, however each is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloister import pipeline, reference
from cloister.errors import SettingError
from cloister.evaluate.subject import BundleSubject, CheckpointSubject, open_subject
from cloister.model.checkpoint import Checkpoint
from cloister.model.recipe import Recipe
from cloister.pairs import Pair
from cloister.quantize.apply import quantize

pytestmark = pytest.mark.slow

REQUESTS = ("play Blue by Joni Mitchell", "will it rain in Rome tomorrow", "book a table for two")
LONG = "the old king looked out over the sea and said nothing for a long while " * 35


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("quantized") / "nano-1"
    quantize(Checkpoint.open(reference.checkpoint_path("nano-1")), path,
             Recipe.parse("8da4w-g32"))
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def checkpoint(quantized: Checkpoint) -> CheckpointSubject:
    return CheckpointSubject(quantized)


@pytest.fixture(scope="module")
def bundle(quantized: Checkpoint) -> BundleSubject:
    """What is exported of it."""
    path = quantized.path.with_name("nano-1.cloister")
    pipeline.export(quantized, path)
    return BundleSubject(path)


def asked(subject: BundleSubject | CheckpointSubject) -> list[Pair]:
    from cloister.corpus import Example
    from cloister.pairs import pair

    return [
        pair(subject.tokenizer, Example(task="call", input=request, target=target))
        for request, target in [*((text, "x y z") for text in REQUESTS), ("tell", LONG)]
    ]


def test_there_is_a_row_of_logits_for_every_token_of_an_answer(
    bundle: BundleSubject, checkpoint: CheckpointSubject
) -> None:
    """Also where prompt or answer span three calls of the program."""
    pairs = [*asked(bundle), (asked(bundle)[3][1], [5, 6])]
    assert len(pairs[3][1]) > 300
    assert len(pairs[4][0]) > 300
    for subject in (bundle, checkpoint):
        rows = list(subject.logits(iter(pairs)))
        assert [found.shape for found in rows] == [
            (len(answer), subject.vocabulary) for _, answer in pairs]
        assert all(found.dtype == torch.float32 for found in rows)
        decoder = checkpoint._decoder
        for found, (prompt, answer) in zip(rows, pairs, strict=True):
            with torch.no_grad():
                wanted = decoder(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
            divergence = torch.nn.functional.kl_div(
                found.log_softmax(-1), wanted.log_softmax(-1), log_target=True,
                reduction="batchmean")
            assert float(divergence) < 1e-3


def test_logits_do_not_depend_on_what_is_read_together() -> None:
    """Unquantized, so that nothing makes more of a last digit."""
    checkpoint = Checkpoint.open(reference.checkpoint_path("nano-1"))
    plain, apart = CheckpointSubject(checkpoint), CheckpointSubject(checkpoint, batch_bytes=1)
    pairs, sizes = asked(plain), []
    for subject in (plain, apart):
        subject._decoder.register_forward_hook(lambda _, given, out: sizes.append(len(given[0])))
    for one, other in zip(list(plain.logits(pairs)), apart.logits(pairs), strict=True):
        assert torch.allclose(one, other, atol=1e-3)
    assert sizes == [4, 1, 1, 1, 1]
    assert list(plain.logits([])) == []


def test_both_give_the_same_greedy_answers(
    bundle: BundleSubject, checkpoint: CheckpointSubject
) -> None:
    prompts = [prompt for prompt, _ in asked(bundle)[:3]]
    answers = list(bundle.answers(prompts, 60))
    assert list(checkpoint.answers(prompts, 60)) == answers
    assert all(0 < len(answer) < 60 for answer in answers)
    assert not any(set(answer) & set(bundle.eos) for answer in answers)
    assert list(bundle.answers(prompts, 3)) == [answer[:3] for answer in answers]
    full = [[5] * (bundle.context - 2)]
    assert list(bundle.answers(full, 60)) == list(checkpoint.answers(full, 60))


def test_a_directory_that_is_neither_is_refused(tmp_path: Path) -> None:
    assert isinstance(open_subject(reference.bundle_path("nano-1")), BundleSubject)
    assert isinstance(open_subject(reference.checkpoint_path("nano-1")), CheckpointSubject)
    with pytest.raises(SettingError, match="neither a bundle nor a checkpoint"):
        open_subject(tmp_path)
