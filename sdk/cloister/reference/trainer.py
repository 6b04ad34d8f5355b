"""Training of an encoder on letters and tokens: one loop for sound and for lines of text.

    OUT/state/            weights and optimizer; the same run goes on from here
    OUT/metrics.jsonl     loss and scores, now and then
    OUT/report.json       the scores at the end
    OUT/*.safetensors     the model so far, see ctc.py

Minutes are of the processor, all processes and all runs together, or of a GPU by the clock.
Batches are drawn by number, so a run that is stopped goes on with the same ones; with more minutes
it goes on for longer.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn

from cloister.distill import state
from cloister.distill.loop import Run, graceful_interrupt
from cloister.distill.optimizer import Optimizer
from cloister.distill.parallel import Parallel
from cloister.distill.schedule import Schedule
from cloister.errors import LossNotFinite, SettingError
from cloister.files import disk_errors, whole_file
from cloister.progress import silent
from cloister.reference import ctc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from cloister.progress import Progress
    from cloister.reference.ctc import CtcModel

__all__ = ["REPORT", "Batch", "Source", "Supply", "TrainerSettings", "train"]

REPORT = "report.json"
_METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How long and how fast an encoder learns.

    Raises:
        SettingError: a value outside its bound.
    """

    minutes: float = 60.0
    steps: int | None = None  # in place of minutes
    peak: float = 5e-3  # learning rate
    warmup: int = 100  # steps
    decay: float = 0.8  # share of the run, the last one, in which the rate falls
    final: float = 0.02  # share of the peak at which it ends
    clip: float = 1.0  # norm of the gradient
    covered: bool = False  # stripes of what the encoder reads, see `_cover`
    mean: bool = False  # keep that of the weights begun from and reached
    seed: int = 0
    save_every_s: float = 180.0
    measure_every_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("minutes", "peak", "clip", "save_every_s", "measure_every_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        for name, value in (("warmup", self.warmup), ("steps", self.steps)):
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}; it must be at least 1.")

    def done(self, run: Run) -> float:
        """Return the share of the run that is over."""
        if self.steps is not None:
            return len(run.losses) / self.steps
        return run.seconds / (60 * self.minutes)

    def rate(self, run: Run) -> float:
        """Return the learning rate of the next step: a rise, a plateau, a fall."""
        rising = (len(run.losses) + 1) / self.warmup
        falling = (1 - self.done(run)) / self.decay if self.decay else 1.0
        return self.peak * min(1.0, rising, max(self.final, falling))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Recordings float32[B, N] or grey pictures uint8[B, R, W], and what each says."""

    x: torch.Tensor
    texts: Sequence[str]  # of the model's alphabet
    tokens: Sequence[Sequence[int]]  # of the texts, or whether one ends at each byte spelled
    spelled: Sequence[bytes] = ()


class Supply(Protocol):
    """Batches one after another."""

    @property
    def seconds(self) -> float:
        """What other processes have spent on them."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches without end."""


class Source(Protocol):
    """What a run learns from."""

    @property
    def identity(self) -> object:
        """What its batches hang on, JSON-ready."""

    def supply(self, first: int) -> AbstractContextManager[Supply]:
        """Return the batches from number `first` on."""


def train(
    model: CtcModel, source: Source, settings: TrainerSettings, folder: Path, *,
    measure: Callable[[CtcModel], Mapping[str, object]] | None = None, origin: str = "",
    progress: Progress = silent,
) -> Run:
    """Train `model` in place, on the device that it is on; write state, metrics and weights.

    After a stop the run goes on from `folder`, if settings but its length, source and `origin`,
    what the model began as, are the same. `measure` is asked for scores now and then, and at the
    end.

    Raises:
        SettingError: the state is another run's.
        LossNotFinite: the loss is NaN or infinite; the state holds the last good weights.
        NotEnoughDisk, OutputUnwritable: a file of the run cannot be written.
        TrainingError: the state cannot be read, or a process that makes batches ended.
        DataError: a batch cannot be made.
    """
    return _Training(model, settings, folder, measure, [source.identity, origin]).run(
        source, progress)


class _Training:
    """One run of `train`."""

    def __init__(
        self, model: CtcModel, settings: TrainerSettings, folder: Path,
        measure: Callable[[CtcModel], Mapping[str, object]] | None, origin: object,
    ) -> None:
        self.model, self.settings, self.folder, self.measure = model, settings, folder, measure
        self.optimizer = Optimizer(
            model, Schedule(peak=settings.peak, autocast=model.device.type == "cuda"),
            blocks=model.blocks)
        self.parallel = Parallel()
        schedule = asdict(replace(
            settings, minutes=1, steps=None, save_every_s=1, measure_every_s=1))
        del schedule["mean"]  # of what is kept, not of what is learnt
        self.identity = json.dumps(
            [schedule, asdict(model.sense.config), model.vocabulary, origin],
            sort_keys=True)
        self.begun = {name: value.clone() for name, value in model.state_dict().items()
                      } if settings.mean else None
        self.clock = time.perf_counter if model.device.type == "cuda" else time.process_time

    def run(self, source: Source, progress: Progress) -> Run:
        settings, run = self.settings, self._resume()
        if settings.done(run) >= 1 and self.begun is not None:  # stopped before that was written
            self._mean(self.begun)
        saved = measured = run.seconds
        self.model.train()
        with graceful_interrupt() as interrupted, source.supply(len(run.losses)) as supply:
            began, batches = self.clock() - run.seconds, iter(supply)
            if self.model.device.type == "cuda":
                batches = _ahead(batches)
            while settings.done(run) < 1:
                rate = settings.rate(run)
                batch = next(batches)
                run.losses.append(self._learn(batch, len(run.losses), rate))
                run.tokens += sum(map(len, batch.tokens))
                run.seconds = self.clock() - began + supply.seconds
                progress("train", min(1000, int(1000 * settings.done(run))), 1000,
                         f"step {len(run.losses):,}, {run.seconds / 60:.1f} minutes, "
                         f"loss {_recent(run):.3f}")
                last = settings.done(run) >= 1
                if last or interrupted() or run.seconds - saved >= settings.save_every_s:
                    saved = run.seconds
                    self._save(run, rate)
                if last and self.begun is not None:
                    self._mean(self.begun)
                if self.measure is not None and (
                    last or run.seconds - measured >= settings.measure_every_s
                ):
                    measured, before = run.seconds, self.clock()
                    self._record(run)
                    began += self.clock() - before
                if interrupted() and not last:
                    raise KeyboardInterrupt
        self.model.eval()
        return run

    def _learn(self, batch: Batch, number: int, rate: float) -> float:
        """Make one step; return its loss."""
        x_BCRW = self.model.features(batch.x.to(self.model.device))
        if self.settings.covered:
            x_BCRW = _cover(x_BCRW, np.random.default_rng((self.settings.seed, number, 2)))
        loss = self.model.loss(x_BCRW, batch.texts, batch.tokens, batch.spelled)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        taken, norm_ = torch.stack((loss.detach(), norm)).tolist()  # one wait for the device
        if not np.isfinite(norm_):
            raise LossNotFinite(
                f"The loss of step {number + 1} or its gradient is not finite; lower the learning "
                "rate and run it again.")
        self.optimizer.step(rate)
        return float(taken)

    def _tensors(self) -> dict[str, torch.Tensor]:
        weights = {f"weights.{name}": value.detach()
                   for name, value in self.model.named_parameters()}
        return weights | self.optimizer.tensors

    def _save(self, run: Run, rate: float) -> None:
        record = state.Record(
            identity=self.identity, phase=(rate, False), losses=run.losses, seconds=run.seconds,
            tokens=run.tokens)
        state.save_state(self.folder / "state", record, self._tensors(), self.parallel)
        ctc.write(self.model, self.folder)

    def _mean(self, begun: Mapping[str, torch.Tensor]) -> None:
        """Keep the mean; the state has the weights that were reached, to go on from."""
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.lerp_(begun[name], 0.5)
        ctc.write(self.model, self.folder)

    def _resume(self) -> Run:
        record = state.read_record(self.folder / "state")
        if record is None:
            return Run()
        if record.identity != self.identity:
            raise SettingError(
                f"{self.folder.name} was left by a run with other settings or data; repeat that "
                "one, or name another folder.")
        state.load_state(self.folder / "state", self._tensors(), self.parallel)
        return Run(losses=record.losses, seconds=record.seconds, tokens=record.tokens)

    def _record(self, run: Run) -> None:
        assert self.measure is not None
        self.model.eval()
        line = {"minutes": round(run.seconds / 60, 1), "steps": len(run.losses),
                "loss": round(_recent(run), 4), **self.measure(self.model)}
        self.model.train()
        path = self.folder / _METRICS
        with disk_errors(path.name), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        with whole_file(self.folder / REPORT) as report:
            report.write((json.dumps(line, indent=1) + "\n").encode())


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches, each made while the one before is learnt from."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches)
        while True:
            batch = waiting.result()
            waiting = pool.submit(next, batches)
            yield batch


def _cover(x_BCRW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Cover two stripes of rows and two of columns (SpecAugment, arXiv 1904.08779)."""
    batch, _, rows, columns = x_BCRW.shape
    covered = torch.zeros((batch, 1, rows, columns), dtype=torch.bool, device=x_BCRW.device)
    for count, most, shape in (
        (rows, rows // 6, (batch, 1, rows, 1)),
        (columns, min(25, columns // 8), (batch, 1, 1, columns)),
    ):
        at_N = torch.arange(count, device=x_BCRW.device)
        for _ in range(2):
            width = rng.integers(most + 1, size=(batch, 1))
            begin = rng.integers(count - width + 1)
            ends = torch.from_numpy(np.stack((begin, begin + width))).to(x_BCRW.device)
            covered |= ((at_N >= ends[0]) & (at_N < ends[1])).view(shape)
    return torch.where(covered, x_BCRW.mean((1, 2, 3), keepdim=True), x_BCRW)


def _recent(run: Run) -> float:
    return float(np.mean(run.losses[-100:]))
