"""The report of one model on one data set: scores, and divergence from another model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from cloister.errors import (
    MediaTooLarge,
    MediaUnreadable,
    NonFiniteTensor,
    SettingError,
    UnsupportedMedia,
    VocabularyMismatch,
)
from cloister.evaluate.divergence import Divergence, compare
from cloister.evaluate.tasks import Score, check, correct, flips, resampled_error, scores
from cloister.example import CHAT
from cloister.pairs import pairs as to_ids
from cloister.parts import Picture, Recording
from cloister.progress import silent
from cloister.runtime.prompt import decoded
from cloister.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloister.corpus import Example
    from cloister.evaluate.subject import Media, Subject
    from cloister.pairs import Pair
    from cloister.pieces import MediaFormats
    from cloister.progress import Progress

__all__ = ["Report", "evaluate"]

_TEXTS = ("story", CHAT)  # tasks with no one right answer: how well the text is predicted counts


@dataclass(frozen=True, kw_only=True)
class Report(Summary):
    """Scores by task, and divergence from another model where one was given."""

    model: str
    n: int
    tasks: dict[str, dict[str, Score]]
    against: str | None = None
    divergence: Divergence | None = None
    flips: Score | None = None
    answers: dict[str, list[bool]] = field(default_factory=dict, repr=False)  # right or not

    @property
    def metrics(self) -> dict[str, float]:
        """Every value by its name; with several tasks, `TASK.NAME`."""
        return {name: score.value for name, score in self._scores()} | self._divergences()

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors, by the same names."""
        errors = {name: score.error for name, score in self._scores()}
        if self.divergence:
            errors |= {
                name.removesuffix("_se"): value
                for name, value in self.divergence.to_dict().items() if name.endswith("_se")}
        return errors | ({"flips": self.flips.error} if self.flips else {})

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return every value with its standard error."""
        yield "model", self.model
        if self.against is not None:
            yield "against", self.against
        yield "examples", f"{self.n:,}"
        errors = self.errors
        for name, value in self.metrics.items():
            yield name, f"{value:.4g}" + (f" ± {errors[name]:.2g}" if name in errors else "")

    def to_dict(self) -> dict[str, object]:
        """Return the report, JSON-ready."""
        record: dict[str, object] = {
            "model": self.model, "n": self.n, "metrics": self.metrics, "errors": self.errors}
        if self.against is not None:
            record["against"] = self.against
        return record

    def _scores(self) -> Iterator[tuple[str, Score]]:
        for task, scored in self.tasks.items():
            for name, score in scored.items():
                yield (name if len(self.tasks) == 1 else f"{task}.{name}"), score

    def _divergences(self) -> dict[str, float]:
        figures = self.divergence.to_dict() if self.divergence else {}
        values = {
            name: value for name, value in figures.items()
            if name != "n" and not name.endswith("_se")}
        return values | ({"flips": self.flips.value} if self.flips else {})


def evaluate(
    subject: Subject, examples: Sequence[Example], *, against: Subject | None = None,
    progress: Progress = silent
) -> Report:
    """Score `subject` on `examples`, and measure its divergence from `against`.

    Answers are greedy. Divergence and bits a byte are those of the given answers' tokens, each
    predicted from the request and the answer so far. Pictures and recordings are decoded as they
    are for a conversation.

    Raises:
        ContextExceeded: an example does not fit one of the models, named by its place.
        DataError: a target is not what its task asks for (see `tasks.check`).
        UnsupportedMedia, MediaUnreadable, MediaTooLarge: a model does not take a picture or
            recording, which is named by its place.
        VocabularyMismatch: the two models have different tokenizers.
        SettingError: there is nothing to evaluate, or a model names no end of an answer.
        NonFiniteTensor: a model gives logits that are NaN or infinite.
    """
    if not examples:
        raise SettingError("There are no examples to evaluate; name other data.")
    if against is not None:
        _check_alike(subject, against)
    if not subject.eos:
        raise SettingError(
            f"{subject.name} names no token that ends an answer; import or export it anew.")
    shorter = min(subject, against or subject, key=lambda model: model.context)
    examples = _decoded(examples, subject.formats, progress)
    media = [
        [part for turn in example.turns for part in turn.media
         if isinstance(part, Picture | Recording)] for example in examples]
    pairs = to_ids(subject.tokenizer, examples, shorter.context, shorter.name)
    check(examples)
    tasks, right, other_right = {}, {}, []
    for task, numbers in _by_task(examples).items():
        chosen = [examples[number] for number in numbers]
        ids, parts = [pairs[number] for number in numbers], [media[number] for number in numbers]
        if task in _TEXTS:
            tasks[task] = {"bits_per_byte": _bits(subject, ids, parts, chosen, progress)}
            continue
        texts = _answers(subject, ids, parts, progress)
        tasks[task], right[task] = scores(chosen, texts), correct(chosen, texts)
        if against is not None:
            other_right += correct(chosen, _answers(against, ids, parts, progress))
    divergence = None
    if against is not None:
        def watched() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            both = zip(
                _logits(against, pairs, media), _logits(subject, pairs, media), strict=True)
            for done, logits in enumerate(both, start=1):
                progress("divergence", done, len(pairs))
                yield logits

        divergence = compare(watched(), (torch.tensor(answer) for _, answer in pairs))
    mine = [hit for hits in right.values() for hit in hits]
    return Report(
        model=subject.name, n=len(examples), tasks=tasks, answers=right,
        against=against.name if against else None, divergence=divergence,
        flips=flips(other_right, mine) if other_right else None,
    )


def _check_alike(subject: Subject, against: Subject) -> None:
    if subject.vocabulary != against.vocabulary or (
        subject.tokenizer.fingerprint != against.tokenizer.fingerprint
    ):
        raise VocabularyMismatch(
            f"{subject.name} and {against.name} have different tokenizers, so their "
            "distributions cannot be compared; name another model."
        )


def _by_task(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Return the numbers of the examples of each task."""
    numbers: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        numbers.setdefault(example.task, []).append(number)
    return numbers


def _decoded(
    examples: Sequence[Example], formats: MediaFormats | None, progress: Progress
) -> list[Example]:
    """Return the examples, pictures and recordings decoded for a model of `formats`."""
    done, count = 0, sum(bool(example.files) for example in examples)
    ready: list[Example] = []
    for number, example in enumerate(examples, start=1):
        if not example.files:
            ready.append(example)
            continue
        try:
            turns = decoded(example.messages, formats)
        except (UnsupportedMedia, MediaUnreadable, MediaTooLarge) as error:
            raise type(error)(f"{example.place or f'Example {number}'}: {error}") from None
        ready.append(replace(example, turns=turns))
        done += 1
        progress("pictures and recordings", done, count)
    return ready


def _parts(media: Media) -> Media:
    """Return `media`, or none where no prompt has any, so that text is read as it always is."""
    return media if any(media) else ()


def _answers(
    subject: Subject, pairs: Sequence[Pair], media: Media, progress: Progress
) -> list[str]:
    """Return greedy answers; none is cut off that could still be right."""
    limit = 2 * max(len(answer) for _, answer in pairs) + 16
    texts = []
    for ids in subject.answers([prompt for prompt, _ in pairs], limit, _parts(media)):
        texts.append(subject.tokenizer.decode(ids))
        progress("answers", len(texts), len(pairs))
    return texts


def _logits(subject: Subject, pairs: Sequence[Pair], media: Media) -> Iterator[torch.Tensor]:
    for logits_NV in subject.logits(pairs, _parts(media)):
        if not logits_NV.isfinite().all():
            raise NonFiniteTensor(
                f"{subject.name} gives logits that are NaN or infinite; train or convert it again.")
        yield logits_NV


def _bits(
    subject: Subject, pairs: Sequence[Pair], media: Media, examples: Sequence[Example],
    progress: Progress
) -> Score:
    """Return the bits that predicting a byte of the answers takes, their end token apart."""
    rows = []
    for logits_NV, (_, answer), example in zip(
        _logits(subject, pairs, media), pairs, examples, strict=True
    ):
        chosen = torch.tensor(answer[:-1])[:, None]
        log_p = logits_NV[:-1].double().log_softmax(-1).gather(-1, chosen)
        rows.append((-float(log_p.sum()) / math.log(2), len(example.target.encode())))
        progress("text", len(rows), len(pairs))

    def rate(chosen: Sequence[tuple[float, int]]) -> float:
        return sum(bits for bits, _ in chosen) / sum(size for _, size in chosen)

    return Score(value=rate(rows), error=resampled_error(rows, rate), n=len(rows))
