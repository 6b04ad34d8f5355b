"""What a projector to tokens learns from a text teacher: to say by sound or sight what words say.

The encoder and the decoder stay as they are, and so do the tokens that are found. What is learnt is
the correction (see `TokenProjector`): a teacher that reads the words tells how each token of an
answer is to be predicted, and the student reads the recording or picture of them instead.

Shapes: B clips, N positions of the encoder, M of them kept, D encoder's hidden size, E decoder's, T
positions, A of them answered, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.distill import losses
from cloister.distill.losses import Objective
from cloister.errors import LossNotFinite, SettingError
from cloister.model.cache import KVCache
from cloister.progress import silent

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cloister.model.projector import TokenProjector
    from cloister.model.transformer import Decoder
    from cloister.progress import Progress

__all__ = ["Clip", "SenseSettings", "answers", "learn"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recording or picture as the encoder gives it, and the prompt around it, in token ids."""

    x_ND: torch.Tensor = field(repr=False)
    before: tuple[int, ...] = field(repr=False)
    words: tuple[int, ...] = field(repr=False)  # in its place, for a teacher
    after: tuple[int, ...] = field(repr=False)
    answer: tuple[int, ...] = field(repr=False)  # with the token that ends it


@dataclass(frozen=True, kw_only=True)
class SenseSettings:
    """The settings of `learn`.

    Raises:
        SettingError: a value outside its bound.
    """

    steps: int = 400
    clips: int = 32  # a step
    peak: float = 3e-4  # learning rate
    warmup: int = 20  # steps
    objective: Objective = field(default_factory=lambda: Objective(hard=0.0))
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("clips", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.peak < 1:
            raise SettingError(f"peak is {self.peak}; it must lie between 0 and 1.")

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`: linear warm-up, then linear decay to 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * (self.steps - step) / max(1, self.steps - self.warmup)


def learn(
    projector: TokenProjector, decoder: Decoder, clips: Sequence[Clip], settings: SenseSettings, *,
    teacher: Decoder | None = None, progress: Progress = silent
) -> list[float]:
    """Train the correction of `projector` in place; return each step's loss, in nats a token.

    Without a `teacher` all is cross-entropy on the clips' answers.

    Raises:
        SettingError: there is nothing to learn from.
        LossNotFinite: a loss is NaN or infinite; the correction is as it was before its step.
    """
    objective = settings.objective
    if not clips:
        raise SettingError("There are no clips to learn from; give some.")
    if teacher is None and objective.hard < 1:
        raise SettingError("There is no teacher to learn from; name one, or set hard to 1.")
    found = [_found(projector, clip) for clip in clips]
    weight = projector.correction.weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=settings.peak, betas=(0.9, 0.95), weight_decay=0.0)
    rng, order, taken = random.Random(settings.seed), list[int](), list[float]()
    for step in range(settings.steps):
        while len(order) < settings.clips:
            order += rng.sample(range(len(clips)), len(clips))
        chosen, order = order[:settings.clips], order[settings.clips:]
        loss = _loss(
            projector, decoder, [(clips[number], *found[number]) for number in chosen], objective,
            teacher)
        if not loss.isfinite():
            raise LossNotFinite(
                f"The loss of step {step + 1} is not finite; begin anew at a lower learning rate.")
        weight.grad, = torch.autograd.grad(loss, [weight])
        nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.step()
        taken.append(loss.item())
        recent = taken[-20:]
        progress("learn", step + 1, settings.steps, f"loss {sum(recent) / len(recent):.4f}")
    weight.requires_grad_(False)
    return taken


@torch.no_grad()
def answers(
    projector: TokenProjector, decoder: Decoder, clips: Sequence[Clip], *, end: Collection[int],
    limit: int, progress: Progress = silent
) -> list[list[int]]:
    """Return the greedy answer to each clip, without the token of `end` that closed it."""
    said: list[list[int]] = []
    for number, clip in enumerate(clips, start=1):
        answer, cache = list[int](), KVCache(decoder.config)
        x_1TE = _prompt(projector, decoder, clip, *_found(projector, clip)).unsqueeze(0)
        while len(answer) < limit and cache.start + x_1TE.shape[1] < decoder.config.shape.context:
            rows_1TE = decoder.hidden_from(x_1TE, cache.start, cache)
            cache.advance(x_1TE.shape[1])
            token = int(decoder.logits(rows_1TE[:, -1:]).argmax())
            if token in end:
                break
            answer.append(token)
            x_1TE = decoder.embed_tokens(torch.tensor([[token]], device=decoder.cos.device))
        said.append(answer)
        progress("answers", number, len(clips))
    return said


@torch.no_grad()
def _found(projector: TokenProjector, clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors and tokens at the places that are kept, [M, D] and int64[M]."""
    x_1ND, tokens_1N = projector.found(
        clip.x_ND.unsqueeze(0).to(projector.correction.weight.device))
    kept_1N = projector.kept(tokens_1N)
    return x_1ND[kept_1N], tokens_1N[kept_1N]


def _prompt(
    projector: TokenProjector, decoder: Decoder, clip: Clip, x_MD: torch.Tensor,
    tokens_M: torch.Tensor
) -> torch.Tensor:
    """Return what the first layer reads up to the answer, [T, E]."""
    before_BE, after_AE = (_embedded(decoder, ids) for ids in (clip.before, clip.after))
    return torch.cat((before_BE, projector.vectors(x_MD, tokens_M), after_AE))


def _loss(
    projector: TokenProjector, decoder: Decoder,
    batch: Sequence[tuple[Clip, torch.Tensor, torch.Tensor]], objective: Objective,
    teacher: Decoder | None
) -> torch.Tensor:
    """Return the mean loss over the answers' tokens."""
    student_AV = _answered(decoder, [
        (_prompt(projector, decoder, clip, x_MD, tokens_M), clip.answer)
        for clip, x_MD, tokens_M in batch]).log_softmax(-1)
    labels_A = torch.tensor(
        [id_ for clip, *_ in batch for id_ in clip.answer], device=student_AV.device)
    loss = objective.hard * functional.nll_loss(student_AV, labels_A, reduction="sum")
    if objective.hard < 1:
        assert teacher is not None
        with torch.no_grad():
            teacher_AV = _answered(teacher, [
                (_embedded(teacher, clip.before + clip.words + clip.after), clip.answer)
                for clip, *_ in batch])
        loss = loss + (1 - objective.hard) * losses.divergence(student_AV, teacher_AV, objective)
    return loss / len(labels_A)


def _answered(
    decoder: Decoder, rows: Sequence[tuple[torch.Tensor, tuple[int, ...]]]
) -> torch.Tensor:
    """Return the logits that predict each token of the answers to prompts, [A, V].

    What follows a row changes nothing in it, so shorter ones are filled up.
    """
    whole = [
        torch.cat((prompt_TE, _embedded(decoder, answer[:-1]))) for prompt_TE, answer in rows]
    x_BTE = nn.utils.rnn.pad_sequence(whole, batch_first=True)
    hidden_BTE = decoder.hidden_from(x_BTE, 0, KVCache(decoder.config))
    answered = [
        hidden_TE[len(prompt_TE) - 1:len(prompt_TE) + len(answer) - 1]
        for hidden_TE, (prompt_TE, answer) in zip(hidden_BTE, rows, strict=True)]
    return decoder.logits(torch.cat(answered)).float()


def _embedded(decoder: Decoder, ids: tuple[int, ...]) -> torch.Tensor:
    return decoder.embed_tokens(torch.tensor(ids, dtype=torch.int64, device=decoder.cos.device))
