"""The training loop: the same program on one process, and on many under torchrun.

Shapes: B rows, T positions, N positions to be learnt, D hidden size, V vocabulary.

A batch is planned alike by every process, and each learns from its share of the rows; a loss is
the sum over all processes divided by the number of labels of all. So the losses do not depend on
how many processes there are, rounding apart.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from cloister.distill import losses
from cloister.distill.data import (
    IGNORE,
    Batch,
    Packed,
    Pair,
    batch,
    fingerprint,
    one_pass,
    schedule_rows,
)
from cloister.distill.losses import Objective
from cloister.distill.optimizer import Optimizer
from cloister.distill.parallel import Parallel, multiplies_bfloat16
from cloister.distill.progress import bar
from cloister.distill.state import read_state, write_state, writing
from cloister.distill.teacher import Sampled
from cloister.errors import LossNotFinite, SettingError, VocabularyMismatch
from cloister.model.generate import generate
from cloister.model.transformer import Attention, FeedForward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle

    from cloister.distill.schedule import OnPolicy, Schedule
    from cloister.model.transformer import Decoder

__all__ = ["Run", "check_recorded", "train"]

_T = TypeVar("_T")


@dataclass(kw_only=True)
class Run:
    """What training cost, kills and restarts included."""

    losses: list[float] = field(default_factory=list)  # nats a token, one a step
    seconds: float = 0.0
    tokens: int = 0  # positions that were no padding


def train(
    student: Decoder,
    data: Sequence[Pair],
    schedule: Schedule,
    state: Path,
    *,
    objective: Objective | None = None,
    teacher: Decoder | Sampled | None = None,
    on_policy: OnPolicy | None = None,
    metrics: Path | None = None,
    parallel: Parallel | None = None,
    compiled: bool = False,
    origin: str = "",
    title: str = "training",
    console: Console | None = None,
) -> Run:
    """Train `student` in place.

    The file `state` holds what is needed to go on after a kill: the same losses follow. `origin`
    tells runs apart that settings and data do not: what the student began as. `metrics`
    gets a JSON object a line and step; `console` (or the standard error) shows a bar. With
    `compiled`, torch.compile makes the steps faster, after half a minute or more of compilation.
    Without a teacher all is cross-entropy on the labels.

    Raises:
        SettingError: settings that do not fit together, or `state` is another run's.
        DataError: no data.
        VocabularyMismatch: teacher and student have different vocabularies.
        LossNotFinite: a loss is NaN or infinite; `state` holds the last good weights.
    """
    objective = objective or Objective(hard=1.0)
    parallel = parallel or Parallel()
    _check(student, objective, teacher, on_policy, parallel, compiled=compiled)
    return _Loop(
        student, data, schedule, state, objective, teacher, on_policy, metrics,
        parallel, compiled, origin, title, console,
    ).run()


class _Step(nn.Module):
    """What uses a student's weights, in one module, so that they can be sharded."""

    def __init__(
        self, student: Decoder, teacher: Decoder | Sampled | None, *, compiled: bool
    ) -> None:
        super().__init__()
        self.student = student
        self.held = (teacher,)  # in a tuple: not a part of what is trained, saved or sharded
        self.hidden = torch.compile(_hidden, dynamic=False) if compiled else _hidden

    def forward(self, use: Callable[[], _T]) -> _T:
        """What `use` gives: while it runs, the weights that it needs are here."""
        return use()

    def losses(self, part: Batch, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the labels: cross-entropy, and divergence from the teacher."""
        learnt_BT = part.labels_BT != IGNORE
        labels_N = part.labels_BT[learnt_BT]
        rows_ND = self.hidden(self.student, part.tokens_BT, part.segments_BT)[learnt_BT]
        apart = self._teacher(part, learnt_BT, objective)

        def loss(at: slice) -> tuple[torch.Tensor, torch.Tensor]:
            logits_NV = self.student.logits(rows_ND[at]).float()
            entropy = functional.cross_entropy(logits_NV, labels_N[at], reduction="sum")
            return entropy, apart(logits_NV, at)

        return losses.chunked(loss, len(labels_N), self.student.config.shape.vocab_size)

    def _teacher(
        self, part: Batch, learnt_BT: torch.Tensor, objective: Objective
    ) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """What gives the divergence of the student's logits at a slice of the labels."""
        (teacher,) = self.held
        if objective.hard == 1 or teacher is None:
            return lambda logits_NV, at: logits_NV.new_zeros(())
        if isinstance(teacher, Sampled):
            draws = teacher.targets(part.keys).to(part.tokens_BT.device)
            return lambda logits_NV, at: losses.sampled_cross_entropy(logits_NV, draws[at])
        with torch.no_grad():
            rows_ND = self.hidden(teacher, part.tokens_BT, part.segments_BT)[learnt_BT]

        def apart(logits_NV: torch.Tensor, at: slice) -> torch.Tensor:
            with torch.no_grad():
                teacher_NV = teacher.logits(rows_ND[at]).float()
            return losses.divergence(logits_NV, teacher_NV, objective)

        return apart


def _hidden(
    decoder: Decoder, tokens_BT: torch.Tensor, segments_BT: torch.Tensor
) -> torch.Tensor:
    """[B, T, D]."""
    return decoder.hidden(tokens_BT, 0, Packed(decoder.config, segments_BT))


@contextmanager
def _patience() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the step at hand is ended first; pressed again, it is not."""
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


def _fingerprint(teacher: Decoder | Sampled | None) -> str:
    """Differs between teachers: a little of every weight."""
    if teacher is None or isinstance(teacher, Sampled):
        return type(teacher).__name__
    some = [parameter.detach().flatten()[:64].float().cpu() for parameter in teacher.parameters()]
    return f"{zlib.crc32(torch.cat(some).numpy().tobytes()):08x}"


class _Loop:
    """One run of `train`."""

    def __init__(
        self, student: Decoder, data: Sequence[Pair], schedule: Schedule, state: Path,
        objective: Objective, teacher: Decoder | Sampled | None, on_policy: OnPolicy | None,
        metrics: Path | None, parallel: Parallel, compiled: bool, origin: str, title: str,
        console: Console | None,
    ) -> None:
        self.data, self.schedule, self.state, self.objective = data, schedule, state, objective
        self.on_policy, self.metrics, self.parallel, self.title = (
            on_policy, metrics, parallel, title)
        self.student, self.teacher = student, teacher
        # Of several processes only the first shows what they do.
        self.console = console if parallel.rank == 0 else Console(quiet=True)
        self.step = _Step(student, teacher, compiled=compiled)
        parallel.shard(self.step, student.layers)
        self.narrow = schedule.autocast and multiplies_bfloat16(parallel.device)
        self.optimizer = Optimizer(student, schedule)
        self.run_ = Run()
        self.identity = json.dumps([
            asdict(replace(schedule, steps=1)), asdict(objective),
            on_policy and asdict(on_policy), fingerprint(data), _fingerprint(teacher),
            asdict(student.config), origin,
        ])
        self.saved = 0  # steps in `state`

    def run(self) -> Run:
        """Train to the end."""
        schedule, parallel = self.schedule, self.parallel
        self._resume()
        self.student.train()
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        began = time.perf_counter() - self.run_.seconds
        done = len(self.run_.losses)
        dropping = self._dropout()
        try:
            with bar(
                self.title, schedule.steps, done=done, console=self.console
            ) as show, torch.random.fork_rng(parallel.random_devices), _patience() as asked:
                for number, plan in enumerate(self._plans()):
                    if number == schedule.steps:
                        break
                    if number < done:  # a resumed run draws the same batches
                        continue
                    stop = self._learn(number, plan, asked)
                    self.run_.seconds = time.perf_counter() - began
                    show(number + 1, self._note())
                    last = number + 1 == schedule.steps
                    if (number + 1) % schedule.save_every == 0 or last or stop:
                        self._save()
                    if stop:
                        raise KeyboardInterrupt
        finally:
            for hook in dropping:
                hook.remove()
        self.student.eval()
        return self.run_

    def _plans(self) -> Iterator[list[tuple[int, list[list[int]]]]]:
        """Of each step, its batches."""
        schedule = self.schedule
        batches = schedule_rows(
            self.data, schedule.micro, schedule.seed, self.student.config.shape.context)
        while True:
            yield list(islice(batches, max(1, schedule.tokens // schedule.micro)))

    def _learn(
        self, number: int, plan: list[tuple[int, list[list[int]]]], asked: Callable[[], bool]
    ) -> bool:
        """One step; whether any process was asked to stop after it."""
        schedule, parallel = self.schedule, self.parallel
        began = time.perf_counter()
        # Set anew at every step, so that dropout and sampling go on alike after a kill.
        torch.manual_seed(schedule.seed * 1_000_003 + number * parallel.world + parallel.rank)
        objective, own = self.objective, bool(self._phase(number)[1])
        if self.on_policy and own:
            objective, batches = self.on_policy.objective, self._answered(number, plan)
        else:
            batches = [batch(self.data, length, rows) for length, rows in plan]
        count = sum(int((whole.labels_BT != IGNORE).sum()) for whole in batches)
        sums = torch.zeros(4, device=parallel.device)
        for whole in batches:
            part = whole.part(parallel.rank, parallel.world).to(parallel.device)
            with torch.autocast(parallel.device.type, torch.bfloat16, enabled=self.narrow):
                entropy, apart = self.step(lambda part=part: self.step.losses(part, objective))
            loss = (objective.hard * entropy + (1 - objective.hard) * apart) / count
            # Gradients are averaged over processes, and the loss is a sum over them.
            torch.autograd.backward(loss * parallel.world)
            sums[:3] += torch.stack([loss, entropy / count, apart / count]).detach()
        norm = float(parallel.full(
            nn.utils.clip_grad_norm_(self.student.parameters(), schedule.clip)))
        sums[3] = asked()
        total, entropy_a_token, apart_a_token, stop = parallel.sum(sums)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise LossNotFinite(self._diverged(number, batches))
        rate = schedule.rate(number)
        self.optimizer.step(rate)
        self.run_.losses.append(total)
        tokens = sum(int((whole.segments_BT >= 0).sum()) for whole in batches)
        self.run_.tokens += tokens
        self._record({
            "step": number, "loss": total, "cross_entropy": entropy_a_token,
            "divergence": apart_a_token, "rate": rate, "gradient_norm": norm, "tokens": tokens,
            "labels": count, "seconds": round(time.perf_counter() - began, 4), "on_policy": own,
        })
        return stop > 0

    def _phase(self, number: int) -> list[float | bool]:
        """Learning rate of a step, and whether the student answers itself."""
        share = self.on_policy.share if self.on_policy else 0.0
        steps = self.schedule.steps
        return [self.schedule.rate(number), number >= steps - round(steps * share)]

    def _answered(self, number: int, plan: list[tuple[int, list[list[int]]]]) -> list[Batch]:
        """The prompts of `plan` with answers that the student samples now, packed anew."""
        assert self.on_policy is not None
        limit, heat = self.on_policy.limit, self.on_policy.temperature
        numbers = [number for _, rows in plan for row in rows for number in row]
        end = self.data[numbers[0]][1][-1]
        chance = torch.Generator(self.parallel.device).manual_seed(
            self.schedule.seed * 1_000_003 + number)
        self.student.eval()
        with torch.autocast(
            self.parallel.device.type, torch.bfloat16, enabled=self.narrow
        ):
            answers = self.step(lambda: generate(
                self.student, [self.data[number][0] for number in numbers], end=(end,),
                limit=limit, temperature=heat, generator=chance,
            ))
        self.student.train()
        own = [
            (self.data[number][0], [*answer, end])
            for number, answer in zip(numbers, answers, strict=True)
        ]
        context = self.student.config.shape.context
        cut = [(prompt, answer[:context - len(prompt)]) for prompt, answer in own]
        made = [
            batch(cut, length, rows)
            for length, rows in one_pass(cut, self.schedule.micro, number, context)
        ]
        return [
            replace(whole, keys=tuple(numbers[key] for key in whole.keys)) for whole in made]

    def _diverged(self, number: int, batches: list[Batch]) -> str:
        keys = [key + 1 for whole in batches for key in whole.keys]
        kept = f"{self.state.name} holds step {self.saved}" if self.saved else "none was kept yet"
        return (
            f"The loss of step {number + 1} is not finite (a batch of {len(keys)} examples, first "
            f"numbers {', '.join(map(str, keys[:8]))}); {kept}: look at those examples, or begin "
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

    def _note(self) -> str:
        recent = self.run_.losses[-20:]
        speed = self.run_.tokens / max(self.run_.seconds, 1e-9)
        return f"loss {sum(recent) / len(recent):.4f}, {speed:,.0f} tokens/s"

    def _record(self, line: dict[str, object]) -> None:
        if self.metrics is not None and self.parallel.rank == 0:
            with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        held = {
            "identity": self.identity, "losses": self.run_.losses,
            "phase": self._phase(len(self.run_.losses) - 1),
            "seconds": self.run_.seconds, "tokens": self.run_.tokens,
            **self.parallel.gather(self.student, self.optimizer),
        }
        if self.parallel.rank == 0:
            write_state(self.state, held)
        self.saved = len(self.run_.losses)

    def _resume(self) -> None:
        """Go on where `state` stopped, if there is one; later lines of `metrics` are dropped."""
        if self.state.exists():
            held = read_state(self.state)
            # More steps are no other run, as long as no later phase had begun.
            phase = self._phase(len(held["losses"]) - 1)
            if held["identity"] != self.identity or held["phase"] != phase:
                raise SettingError(
                    f"{self.state.name} was left by a run with other settings or data; repeat "
                    "that one, or delete the file."
                )
            self.parallel.scatter(held, self.student, self.optimizer)
            self.run_ = Run(
                losses=held["losses"], seconds=held["seconds"], tokens=held["tokens"])
            self.saved = len(self.run_.losses)
        if self.metrics is not None and self.parallel.rank == 0:
            lines = self.metrics.read_text("utf-8").splitlines() if self.metrics.exists() else []
            kept = lines[:len(self.run_.losses)]
            with writing(self.metrics):
                self.metrics.write_text("".join(f"{line}\n" for line in kept), "utf-8")


def check_recorded(objective: Objective, on_policy: OnPolicy | None) -> None:
    """Nothing, where a teacher's draws are enough for what is to be learnt.

    Raises:
        SettingError: they are not.
    """
    if on_policy is not None:
        raise SettingError(
            "A student's own answers need a teacher that reads them; name its checkpoint, not its "
            "recorded logits."
        )
    if objective != Objective(hard=objective.hard):
        raise SettingError(
            "Recorded logits serve the forward KL divergence at temperature 1; choose those.")


def _check(
    student: Decoder, objective: Objective, teacher: Decoder | Sampled | None,
    on_policy: OnPolicy | None, parallel: Parallel, *, compiled: bool,
) -> None:
    if compiled and parallel.world > 1:
        raise SettingError("Compiled steps serve one process; leave --compile out.")
    if objective.hard < 1 and teacher is None:
        raise SettingError("There is no teacher to learn from; name one, or set hard to 1.")
    if isinstance(teacher, Sampled):
        check_recorded(objective, on_policy)
    if on_policy is not None and teacher is None:
        raise SettingError("The student-generated phase needs a teacher; name one.")
    if teacher is not None:
        theirs = (teacher.vocabulary if isinstance(teacher, Sampled)
                  else teacher.config.shape.vocab_size)
        ours = student.config.shape.vocab_size
        if theirs != ours:
            raise VocabularyMismatch(
                f"The teacher has {theirs} tokens and the student {ours}; both must use one "
                "tokenizer: choose another teacher, or make the student with its vocabulary."
            )
