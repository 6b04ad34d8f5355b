"""The training loop: the same program on one process, and on many under torchrun.

Shapes: B rows, T positions, N positions to be learnt, D hidden size, V vocabulary.

A batch is planned alike by every process, and each learns from its share of the rows; a loss is
the sum over all processes divided by the number of labels of all. So the losses do not depend on
how many processes there are, up to rounding.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.distill import losses, state
from cloister.distill.data import (
    IGNORE,
    Batch,
    Packed,
    batch,
    fingerprint,
    one_pass,
    schedule_rows,
)
from cloister.distill.losses import Objective
from cloister.distill.optimizer import Optimizer
from cloister.distill.parallel import Parallel, Sharded
from cloister.distill.teacher import Sampled
from cloister.errors import LossNotFinite, SettingError, VocabularyMismatch
from cloister.files import disk_errors
from cloister.model.device import multiplies_bfloat16
from cloister.model.generate import generate
from cloister.model.transformer import Attention, FeedForward
from cloister.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle

    from cloister.distill.schedule import OnPolicy, TrainSettings
    from cloister.model.transformer import Decoder
    from cloister.pairs import Pair
    from cloister.progress import Progress

__all__ = ["Run", "check_recorded", "graceful_interrupt", "restore", "train"]

_Loss = tuple[torch.Tensor, torch.Tensor]


@dataclass(kw_only=True)
class Run:
    """The cost of training, kills and restarts included."""

    losses: list[float] = field(default_factory=list)  # nats a token, one a step
    seconds: float = 0.0
    tokens: int = 0  # positions that were no padding

    def in_words(self) -> str:
        """Return steps, tokens, time and the last loss, in words."""
        loss = f", last loss {self.losses[-1]:.4g}" if self.losses else ""
        return (f"{len(self.losses):,} steps on {self.tokens:,} tokens in {self.seconds:,.1f} s"
                f"{loss}")


def train(
    student: Decoder | Sharded,
    data: Sequence[Pair],
    settings: TrainSettings,
    folder: Path,
    *,
    teacher: Decoder | Sharded | Sampled | None = None,
    origin: str = "",
    stage: str = "train",
    progress: Progress = silent,
) -> Run:
    """Train `student` in place.

    After a kill the run resumes from `folder/state` with the same losses, on however many
    processes, if settings, data, teacher and `origin`, what the student began as, are the same.
    `folder/metrics.jsonl` gets a JSON object a line and step. Without a teacher all is
    cross-entropy on the labels.

    Raises:
        SettingError: settings that do not fit together, or the state is another run's.
        DataError: no data.
        VocabularyMismatch: teacher and student have different vocabularies.
        LossNotFinite: a loss is NaN or infinite; the state holds the last good weights.
        NotEnoughDisk, OutputUnwritable: a file of the run cannot be written.
        TrainingError: the state cannot be read.
    """
    _check(student, settings, teacher)
    parallel = Parallel()
    if not isinstance(student, Sharded):
        student = Sharded(student, parallel)
    if not isinstance(teacher, Sharded | Sampled | None):
        teacher = Sharded(teacher, parallel)
    loop = _Loop(_Step(student, teacher, compiled=settings.compiled), data, settings, folder)
    return loop.run(origin, stage, progress if parallel.rank == 0 else silent)


class _Step:
    """The forward passes of student and teacher."""

    def __init__(
        self, student: Sharded, teacher: Sharded | Sampled | None, *, compiled: bool
    ) -> None:
        self.student, self.teacher = student, teacher
        self.hidden = torch.compile(_hidden, dynamic=False) if compiled else _hidden

    def losses(self, part: Batch, objective: Objective) -> _Loss:
        """Return sums over the labels: cross-entropy, and divergence from the teacher."""
        sums: _Loss = self.student(lambda: self._losses(part, objective))
        return sums

    def _losses(self, part: Batch, objective: Objective) -> _Loss:
        student = self.student.decoder
        learnt_BT = part.labels_BT != IGNORE
        labels_N = part.labels_BT[learnt_BT]
        rows_ND = self.hidden(student, part.tokens_BT, part.segments_BT)[learnt_BT]
        divergence = self._divergence(part, learnt_BT, objective)

        def loss(at: slice) -> _Loss:
            log_q_NV = student.logits(rows_ND[at]).float().log_softmax(-1)
            entropy = functional.nll_loss(log_q_NV, labels_N[at], reduction="sum")
            return entropy, divergence(log_q_NV, at)

        return losses.chunked(loss, len(labels_N), student.config.shape.vocab_size)

    def _divergence(
        self, part: Batch, learnt_BT: torch.Tensor, objective: Objective
    ) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """Return the divergence as a function of log-probabilities at a slice of the labels."""
        if objective.hard == 1 or self.teacher is None:
            return lambda log_q_NV, at: log_q_NV.new_zeros(())
        if isinstance(self.teacher, Sampled):
            draws = self.teacher.targets(part.keys).to(part.tokens_BT.device)
            return lambda log_q_NV, at: losses.sampled_cross_entropy(log_q_NV, draws[at])
        teacher = self.teacher.decoder
        with torch.no_grad():
            rows_ND = self.teacher(
                lambda: self.hidden(teacher, part.tokens_BT, part.segments_BT))[learnt_BT]

        def divergence(log_q_NV: torch.Tensor, at: slice) -> torch.Tensor:
            with torch.no_grad():  # its head is whole until `release`
                teacher_NV = teacher.logits(rows_ND[at]).float()
            return losses.divergence(log_q_NV, teacher_NV, objective)

        return divergence

    def release(self) -> None:
        """Drop the gathered weights of both models."""
        for model in (self.student, self.teacher):
            if isinstance(model, Sharded):
                model.release()


def _hidden(decoder: Decoder, tokens_BT: torch.Tensor, segments_BT: torch.Tensor) -> torch.Tensor:
    """Return the hidden states, [B, T, D]."""
    return decoder.hidden(tokens_BT, 0, Packed(decoder.config, segments_BT))


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Tell whether Ctrl-C was pressed, so that the step ends first; a second one interrupts it."""
    pressed: list[bool] = []

    def note(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class _Loop:
    """One run of `train`."""

    def __init__(
        self, step: _Step, data: Sequence[Pair], settings: TrainSettings, folder: Path
    ) -> None:
        self.step, self.data, self.settings = step, data, settings
        self.student = step.student.decoder
        self.schedule = settings.schedule.planned(data, self.student.config.shape.context)
        assert self.schedule.steps is not None
        self.steps = self.schedule.steps
        self.parallel = step.student.parallel
        self.bfloat16 = self.schedule.autocast and multiplies_bfloat16(self.parallel.device)
        self.state, self.metrics = folder / "state", folder / "metrics.jsonl"
        self.optimizer = Optimizer(self.student, self.schedule)
        self.saved = 0  # steps in `state`

    def run(self, origin: str, stage: str, progress: Progress) -> Run:
        """Train to the end."""
        self.identity = self._identify(origin)
        self.run_ = self._resume()
        self.student.train()
        began, done = time.perf_counter() - self.run_.seconds, len(self.run_.losses)
        resumed_at, dropping = self.run_.seconds, self._dropout()
        progress(stage, done, self.steps)
        try:
            with torch.random.fork_rng(
                self.parallel.random_devices
            ), graceful_interrupt() as interrupted:
                # A resumed run draws the same batches.
                for number, plan in islice(enumerate(self._plans()), done, self.steps):
                    stop = self._learn(number, plan, interrupted)
                    self.run_.seconds = time.perf_counter() - began
                    speed = (number + 1 - done) / (self.run_.seconds - resumed_at)
                    progress(stage, number + 1, self.steps, self._note(speed))
                    last = number + 1 == self.steps
                    if (number + 1) % self.schedule.save_every == 0 or last or stop:
                        self._save()
                    if stop:
                        raise KeyboardInterrupt
        finally:
            for hook in dropping:
                hook.remove()
        self.student.eval()
        return self.run_

    def _identify(self, origin: str) -> str:
        """Return what must be the same for a run to resume."""
        teacher = self.step.teacher
        return json.dumps([
            asdict(replace(self.schedule, steps=1, passes=1.0)), asdict(self.settings.objective),
            self.settings.on_policy and asdict(self.settings.on_policy), fingerprint(self.data),
            teacher.identity if isinstance(teacher, Sharded) else type(teacher).__name__,
            asdict(self.student.config), origin,
        ])

    def _plans(self) -> Iterator[list[tuple[int, list[list[int]]]]]:
        """Yield the batches of each step."""
        batches = schedule_rows(self.data, self.schedule.micro, self.schedule.seed,
                                self.student.config.shape.context)
        while True:
            yield list(islice(batches, self.schedule.batches))

    def _learn(
        self, number: int, plan: list[tuple[int, list[list[int]]]], interrupted: Callable[[], bool]
    ) -> bool:
        """Take one step, and return whether any process was interrupted meanwhile."""
        parallel, began = self.parallel, time.perf_counter()
        # Set anew at every step, so that dropout and sampling repeat after a kill.
        torch.manual_seed(self.schedule.seed * 1_000_003 + number * parallel.world + parallel.rank)
        objective, own = self.settings.objective, self._phase(number)[1]
        if self.settings.on_policy and own:
            objective = self.settings.on_policy.objective
            batches = self._answered(number, plan)
        else:
            batches = [batch(self.data, length, rows) for length, rows in plan]
        count = sum(int((whole.labels_BT != IGNORE).sum()) for whole in batches)
        sums = torch.zeros(4, device=parallel.device)
        for whole in batches:
            sums[:3] += self._gradient(whole, objective, count)
        norm = float(parallel.full(
            nn.utils.clip_grad_norm_(self.student.parameters(), self.schedule.clip)))
        sums[3] = interrupted()
        total, entropy_a_token, divergence_a_token, stop = parallel.sum(sums)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise LossNotFinite(self._not_finite(number, batches))
        rate = self.schedule.rate(number)
        self.optimizer.step(rate)
        self.run_.losses.append(total)
        tokens = sum(int((whole.segments_BT >= 0).sum()) for whole in batches)
        self.run_.tokens += tokens
        self._record({
            "step": number, "loss": total, "cross_entropy": entropy_a_token,
            "divergence": divergence_a_token, "rate": rate, "gradient_norm": norm,
            "tokens": tokens, "labels": count, "seconds": round(time.perf_counter() - began, 4),
            "on_policy": own,
        })
        return stop > 0

    def _gradient(self, whole: Batch, objective: Objective, count: int) -> torch.Tensor:
        """Add the gradient of a batch; return its loss, cross-entropy and divergence, float32[3].

        All are this process's part of sums over all, divided by `count` labels.
        """
        parallel = self.parallel
        part = whole.part(parallel.rank, parallel.world).to(parallel.device)
        with self._autocast():
            entropy, divergence = self.step.losses(part, objective)
        loss = (objective.hard * entropy + (1 - objective.hard) * divergence) / count
        # Gradients are averaged over processes, and the loss is a sum over them.
        torch.autograd.backward(loss * parallel.world)
        self.step.release()
        return torch.stack([loss, entropy / count, divergence / count]).detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _phase(self, number: int) -> tuple[float, bool]:
        """Return the learning rate of a step, and whether the student answers itself."""
        share = self.settings.on_policy.share if self.settings.on_policy else 0.0
        return self.schedule.rate(number), number >= self.steps - round(self.steps * share)

    def _answered(self, number: int, plan: list[tuple[int, list[list[int]]]]) -> list[Batch]:
        """Return the prompts of `plan` with answers that the student samples now, packed anew."""
        on_policy = self.settings.on_policy
        assert on_policy is not None
        numbers = [number for _, rows in plan for row in rows for number in row]
        end = self.data[numbers[0]][1][-1]
        rng = torch.Generator(self.parallel.device).manual_seed(
            self.schedule.seed * 1_000_003 + number)
        self.student.eval()
        with self._autocast():
            answers: list[list[int]] = self.step.student(lambda: generate(
                self.student, [self.data[number][0] for number in numbers], end=(end,),
                limit=on_policy.limit, temperature=on_policy.temperature, rng=rng,
            ))
        self.student.train()
        own = [
            (self.data[number][0], [*answer, end])
            for number, answer in zip(numbers, answers, strict=True)
        ]
        context = self.student.config.shape.context
        cut = [(prompt, answer[:context - len(prompt)]) for prompt, answer in own]
        batches = (
            batch(cut, length, rows)
            for length, rows in one_pass(cut, self.schedule.micro, number, context))
        return [replace(whole, keys=tuple(numbers[key] for key in whole.keys)) for whole in batches]

    def _not_finite(self, number: int, batches: list[Batch]) -> str:
        keys = [key + 1 for whole in batches for key in whole.keys]
        saved = f"{self.state.name} holds step {self.saved}" if self.saved else "none was kept yet"
        return (
            f"The loss of step {number + 1} is not finite (a batch of {len(keys)} examples, first "
            f"numbers {', '.join(map(str, keys[:8]))}); {saved}: look at those examples, or begin "
            "anew, to another output, at a lower learning rate."
        )

    def _dropout(self) -> list[RemovableHandle]:
        share = self.schedule.dropout
        if not share:
            return []

        def drop(module: nn.Module, _: object, out: torch.Tensor) -> torch.Tensor:
            return functional.dropout(out, share, module.training)

        return [
            module.register_forward_hook(drop) for module in self.student.modules()
            if isinstance(module, Attention | FeedForward)
        ]

    def _note(self, steps_a_second: float) -> str:
        recent = self.run_.losses[-20:]
        left = (self.steps - len(self.run_.losses)) / steps_a_second
        return f"loss {sum(recent) / len(recent):.4f}, {left:.0f} s left"

    def _record(self, line: dict[str, object]) -> None:
        if self.parallel.rank == 0:
            with disk_errors(self.metrics.name), self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        run = self.run_
        record = state.Record(
            identity=self.identity, phase=self._phase(len(run.losses) - 1), losses=run.losses,
            seconds=run.seconds, tokens=run.tokens)
        state.save_state(
            self.state, record, _tensors(self.student) | self.optimizer.tensors, self.parallel)
        self.saved = len(run.losses)

    def _resume(self) -> Run:
        """Resume from the state, if there is one; drop later lines of the metrics."""
        record, run = state.read_record(self.state), Run()
        if record is not None:
            # More steps are no other run, as long as no later phase had begun.
            if record.identity != self.identity or (
                record.phase != self._phase(len(record.losses) - 1)
            ):
                raise SettingError(
                    f"{self.state.name} was left by a run with other settings or data; repeat "
                    "that one, or delete the folder."
                )
            state.load_state(
                self.state, _tensors(self.student) | self.optimizer.tensors, self.parallel)
            run = Run(losses=record.losses, seconds=record.seconds, tokens=record.tokens)
            self.saved = len(run.losses)
        if self.parallel.rank == 0:
            with disk_errors(self.metrics.name):
                lines = self.metrics.read_text("utf-8").splitlines() if (
                    self.metrics.exists()) else []
                self.metrics.write_text(
                    "".join(f"{line}\n" for line in lines[:len(run.losses)]), "utf-8")
        return run


def restore(student: Sharded, folder: Path) -> bool:
    """Read the last weights that a run in `folder` saved; return whether it saved any.

    Raises:
        TrainingError: they cannot be read.
    """
    if state.read_record(folder / "state") is None:
        return False
    state.load_state(folder / "state", _tensors(student.decoder), student.parallel)
    return True


def _tensors(student: Decoder) -> dict[str, torch.Tensor]:
    """Return the weights by the names that they have in a state."""
    return {f"weights.{name}": value.detach() for name, value in student.named_parameters()}


def check_recorded(objective: Objective, on_policy: OnPolicy | None) -> None:
    """Raise SettingError unless a teacher's draws are enough for what is to be learnt."""
    if on_policy is not None:
        raise SettingError(
            "A student's own answers need a teacher that reads them; name its checkpoint, not its "
            "recorded logits."
        )
    if objective != Objective(hard=objective.hard):
        raise SettingError(
            "Recorded logits serve the forward KL divergence at temperature 1; choose those.")


def _check(
    student: Decoder | Sharded, settings: TrainSettings, teacher: Decoder | Sharded | Sampled | None
) -> None:
    """Raise SettingError or VocabularyMismatch unless settings and models fit together."""
    if settings.compiled and Parallel().world > 1:
        raise SettingError("Compiled steps serve one process; leave --compile out.")
    if settings.objective.hard < 1 and teacher is None:
        raise SettingError("There is no teacher to learn from; name one, or set hard to 1.")
    if isinstance(teacher, Sampled):
        check_recorded(settings.objective, settings.on_policy)
    if settings.on_policy is not None and teacher is None:
        raise SettingError("The student-generated phase needs a teacher; name one.")
    if teacher is not None:
        theirs, ours = _vocabulary(teacher), _vocabulary(student)
        if theirs != ours:
            raise VocabularyMismatch(
                f"The teacher has {theirs} tokens and the student {ours}; both must use one "
                "tokenizer: choose another teacher, or make the student with its vocabulary."
            )


def _vocabulary(model: Decoder | Sharded | Sampled) -> int:
    if isinstance(model, Sampled):
        return model.vocabulary
    decoder = model.decoder if isinstance(model, Sharded) else model
    return decoder.config.shape.vocab_size
