"""An evaluation measures the answers' tokens, and asks nothing that a model cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cloister.corpus import Example, tool_call
from cloister.errors import (
    ContextExceeded,
    DataError,
    NonFiniteTensor,
    SettingError,
    VocabularyMismatch,
)
from cloister.evaluate.report import evaluate
from cloister.pairs import Pair
from cloister.tokenizer import Tokenizer

PLAY = Example(task="call", input="play Blue", target=tool_call("Play", [("album", "Blue")]))
STOP = Example(task="call", input="stop", target=tool_call("Stop"))
TALE = Example(task="story", input="It rained.", target="Na\u00efve foxes slept all day.")
CLEAN = Example(task="redact", input="I am Jo", target="I am [NAME]")
SECRET = "zebra"


class Fixed:
    """Answers what it is told, and predicts by a fixed table; see `Subject`."""

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[str] = (), *, seed: int = 0,
        context: int = 400, vocabulary: int = 300, eos: tuple[int, ...] = (0,),
    ) -> None:
        self.name, self.tokenizer, self.eos = f"fixed-{seed}", tokenizer, eos
        self.context, self.vocabulary, self.formats = context, vocabulary, None
        self.texts, self.limits = list(texts), list[int]()
        self._table = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))

    def logits(self, pairs: Iterable[Pair], media: object = ()) -> Iterator[torch.Tensor]:
        for prompt, answer in pairs:
            yield self._table[torch.tensor([prompt[-1], *answer[:-1]])]

    def answers(
        self, prompts: Sequence[list[int]], limit: int, media: object = ()
    ) -> Iterator[list[int]]:
        assert not media
        self.limits.append(limit)
        for _ in prompts:
            yield self.tokenizer.encode(self.texts.pop(0))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja")


def test_one_task_has_flat_names_and_several_say_which(tokenizer: Tokenizer) -> None:
    one = evaluate(Fixed(tokenizer, [PLAY.target, "?"]), [PLAY, STOP])
    assert one.metrics == {
        "frame_exact": 0.5, "frame_said": 0.5, "intent_accuracy": 0.5, "slot_f1": 1.0}
    several = evaluate(
        Fixed(tokenizer, [STOP.target, "I am [NAME]"]), [PLAY, CLEAN, TALE])
    assert several.metrics.keys() == several.errors.keys() == {
        "call.frame_exact", "call.frame_said", "call.intent_accuracy", "call.slot_f1",
        "redact.exact", "story.bits_per_byte"}
    assert (several.metrics["call.frame_exact"], several.metrics["redact.exact"]) == (0, 1)
    assert several.n == 3


def test_bits_a_byte_are_those_of_the_text_without_its_end(tokenizer: Tokenizer) -> None:
    subject = Fixed(tokenizer)
    prompt, answer = _pair(tokenizer, TALE)
    (logits,) = subject.logits([(prompt, answer)])
    nats = sum(
        -float(row.double().log_softmax(-1)[token])
        for row, token in zip(logits[:-1], answer[:-1], strict=True))
    found = evaluate(subject, [TALE]).metrics["bits_per_byte"]
    size = len(TALE.target.encode())
    assert size > len(TALE.target)
    assert found == pytest.approx(nats / math.log(2) / size)
    both = evaluate(subject, [TALE, TALE, TALE])
    assert both.metrics["bits_per_byte"] == pytest.approx(found), "by total, not by text"
    assert both.errors["bits_per_byte"] == pytest.approx(0, abs=1e-12)


def test_divergence_is_measured_on_the_tokens_of_the_answers_and_their_end(
    tokenizer: Tokenizer,
) -> None:
    one, two = Fixed(tokenizer, [PLAY.target] * 2), Fixed(tokenizer, [PLAY.target] * 2, seed=1)
    report = evaluate(one, [PLAY, TALE], against=two)
    pairs = [_pair(tokenizer, example) for example in (PLAY, TALE)]
    candidate, reference = (
        torch.cat(list(subject.logits(pairs))).double().log_softmax(-1) for subject in (one, two))
    labels = torch.tensor([token for _, answer in pairs for token in answer])
    assert report.divergence is not None
    assert report.divergence.n == len(labels)
    assert report.metrics["mean_kld"] == pytest.approx(
        float((reference.exp() * (reference - candidate)).sum(-1).mean())), "KL(against || model)"
    gain = (reference - candidate).gather(1, labels[:, None]).mean()
    assert report.metrics["ppl_ratio"] == pytest.approx(float(gain.exp()))
    assert report.to_dict()["against"] == "fixed-1"


def test_flips_count_answers_whose_rightness_changed(tokenizer: Tokenizer) -> None:
    mine = Fixed(tokenizer, [PLAY.target, "?", CLEAN.target, "no"])
    theirs = Fixed(tokenizer, ["?", STOP.target, CLEAN.target, "other"], seed=1)
    report = evaluate(mine, [PLAY, STOP, CLEAN, CLEAN], against=theirs)
    assert report.metrics["flips"] == 0.5
    stories = evaluate(mine, [TALE], against=theirs)
    assert "flips" not in stories.metrics


def test_an_answer_has_room_for_the_longest_that_is_wanted(tokenizer: Tokenizer) -> None:
    long = Example(task="redact", input="x", target="the quick brown fox " * 400)
    subject = Fixed(tokenizer, [long.target], context=10_000)
    assert evaluate(subject, [long]).metrics["exact"] == 1
    wanted = len(tokenizer.encode(long.target))
    assert wanted > 512
    assert subject.limits[0] >= 2 * wanted, "a right call may be spelled in more tokens"


def test_an_example_must_fit_both_models(tokenizer: Tokenizer) -> None:
    wide, narrow = Fixed(tokenizer, [PLAY.target]), Fixed(tokenizer, seed=1, context=20)
    for subject, other in ((wide, narrow), (narrow, wide)):
        with pytest.raises(ContextExceeded, match=r"Example 1 .* fixed-1 holds 20"):
            evaluate(subject, [PLAY], against=other)
    exact = Fixed(tokenizer, [PLAY.target], context=sum(map(len, _pair(tokenizer, PLAY))))
    assert evaluate(exact, [PLAY]).metrics["frame_exact"] == 1


def test_what_cannot_be_measured_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingError, match="no examples"):
        evaluate(Fixed(tokenizer), [])
    with pytest.raises(SettingError, match="no token that ends"):
        evaluate(Fixed(tokenizer, eos=()), [PLAY])
    with pytest.raises(VocabularyMismatch, match="fixed-0 and fixed-1"):
        evaluate(Fixed(tokenizer), [PLAY], against=Fixed(tokenizer, seed=1, vocabulary=301))
    with pytest.raises(DataError, match="example 2") as refused:
        evaluate(Fixed(tokenizer), [PLAY, Example(task="call", input=SECRET, target=SECRET)])
    assert SECRET not in str(refused.value)
    assert SECRET not in repr(evaluate(
        Fixed(tokenizer, [SECRET]), [Example(task="redact", input=SECRET, target=SECRET)]))


def test_progress_counts_what_is_done(tokenizer: Tokenizer) -> None:
    seen = []
    evaluate(
        Fixed(tokenizer, [PLAY.target]), [PLAY, TALE],
        against=Fixed(tokenizer, [PLAY.target], seed=1), progress=lambda *step: seen.append(step))
    assert seen == [("answers", 1, 1), ("answers", 1, 1), ("text", 1, 1), ("divergence", 1, 2),
                    ("divergence", 2, 2)]


def _pair(tokenizer: Tokenizer, example: Example) -> Pair:
    from cloister.pairs import pair

    return pair(tokenizer, example)


def test_a_model_that_computes_no_numbers_is_refused_by_name(tokenizer: Tokenizer) -> None:
    broken, fine = Fixed(tokenizer, seed=1), Fixed(tokenizer)
    broken._table[:, 3] = math.nan
    for subject, against in ((broken, None), (broken, fine), (fine, broken)):
        with pytest.raises(NonFiniteTensor, match="fixed-1 gives logits that are NaN"):
            evaluate(subject, [TALE], against=against)
