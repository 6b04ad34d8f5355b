"""Training of the encoder of lines, on characters (CTC).

    python -m cloister.reference.fonts FONTS
    python -m cloister.reference.reader --fonts FONTS --minutes 60 -o OUT

    OUT/state/                      weights and optimizer; the same command goes on from here
    OUT/metrics.jsonl               loss and scores in fonts never seen, now and then
    OUT/report.json                 the scores at the end
    OUT/vision.safetensors          the encoder so far, a sense without a projector
    OUT/characters.safetensors      the layer of characters beside it

Minutes are of the processor, those of the processes that draw lines included, all runs together.
Batches are drawn by number, so a run that is stopped goes on with the same ones; with more minutes
it goes on for longer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from torch import nn

from cloister.distill import state
from cloister.distill.loop import Run, graceful_interrupt
from cloister.distill.optimizer import Optimizer
from cloister.distill.parallel import Parallel
from cloister.distill.schedule import Schedule
from cloister.errors import CloisterError, LossNotFinite, SettingError
from cloister.files import disk_errors, whole_file
from cloister.progress import silent
from cloister.reference import characters, fonts, reading
from cloister.reference.batches import Lesson, Supply
from cloister.reference.console import lines
from cloister.reference.mixture import Mixture
from cloister.reference.pictures import Camera
from cloister.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cloister.progress import Progress
    from cloister.reference.batches import Batch
    from cloister.reference.characters import CharacterModel

__all__ = ["ReaderSettings", "main", "train"]

_METRICS, _REPORT = "metrics.jsonl", "report.json"


@dataclass(frozen=True, kw_only=True)
class ReaderSettings:
    """How long and how fast the encoder learns.

    Raises:
        SettingError: a value outside its bound.
    """

    minutes: float = 60.0  # of the processor
    steps: int | None = None  # in place of minutes
    rows: int = 48  # lines a step
    ramp: int = 20_000  # lines, see `Lesson`
    peak: float = 8e-3  # learning rate
    warmup: int = 100  # steps
    decay: float = 0.8  # share of the run, the last one, in which the rate falls
    final: float = 0.02  # share of the peak at which it ends
    clip: float = 1.0  # norm of the gradient
    seed: int = 0
    save_every_s: float = 120.0
    measure_every_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("minutes", "peak", "clip", "save_every_s", "measure_every_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name, least in (("rows", 1), ("warmup", 1), ("ramp", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        if self.steps is not None and self.steps < 1:
            raise SettingError(f"steps is {self.steps}; it must be at least 1.")

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


def train(
    model: CharacterModel, camera: Camera, settings: ReaderSettings, folder: Path, *,
    workers: int = 0, measure: Callable[[CharacterModel], Mapping[str, object]] | None = None,
    progress: Progress = silent,
) -> Run:
    """Train `model` in place on pictures of `camera`; write state, metrics and weights.

    After a stop the run goes on from `folder`, if the settings but its length are the same.
    `measure` is asked for scores now and then, and at the end.

    Raises:
        SettingError: the state is another run's.
        LossNotFinite: the loss is NaN or infinite; the state holds the last good weights.
        NotEnoughDisk, OutputUnwritable: a file of the run cannot be written.
        TrainingError: the state cannot be read, or a process that draws lines ended.
        DataError: no font draws a text.
    """
    return _Training(model, settings, folder, measure).run(camera, workers, progress)


class _Training:
    """One run of `train`."""

    def __init__(
        self, model: CharacterModel, settings: ReaderSettings, folder: Path,
        measure: Callable[[CharacterModel], Mapping[str, object]] | None,
    ) -> None:
        self.model, self.settings, self.folder, self.measure = model, settings, folder, measure
        self.optimizer = Optimizer(
            model, Schedule(peak=settings.peak, autocast=False), blocks="sense.encoder.layers")
        self.parallel = Parallel()
        schedule = replace(settings, minutes=1, steps=None, save_every_s=1, measure_every_s=1)
        self.identity = json.dumps(
            [asdict(schedule), asdict(model.sense.config)], sort_keys=True)

    def run(self, camera: Camera, workers: int, progress: Progress) -> Run:
        settings, run = self.settings, self._resume()
        lesson = Lesson(rows=settings.rows, ramp=settings.ramp, seed=settings.seed)
        saved = measured = run.seconds
        self.model.train()
        with graceful_interrupt() as interrupted, Supply(
            camera, lesson, len(run.losses), workers
        ) as supply:
            began = time.process_time() - run.seconds  # of this process; the workers' is added
            batches = iter(supply)
            while settings.done(run) < 1:
                rate = settings.rate(run)
                batch = next(batches)
                run.losses.append(self._learn(batch, len(run.losses), rate))
                run.tokens += sum(map(len, batch.texts))
                run.seconds = time.process_time() - began + supply.seconds
                progress("read", min(1000, int(1000 * settings.done(run))), 1000,
                         f"step {len(run.losses):,}, {run.seconds / 60:.1f} minutes, "
                         f"loss {_recent(run):.3f}")
                last = settings.done(run) >= 1
                if last or interrupted() or run.seconds - saved >= settings.save_every_s:
                    saved = run.seconds
                    self._save(run, rate)
                if self.measure is not None and (
                    last or run.seconds - measured >= settings.measure_every_s
                ):
                    measured, before = run.seconds, time.process_time()
                    self._record(run)
                    began += time.process_time() - before
                if interrupted() and not last:
                    raise KeyboardInterrupt
        self.model.eval()
        return run

    def _learn(self, batch: Batch, number: int, rate: float) -> float:
        """Make one step; return its loss."""
        loss = self.model.loss(torch.from_numpy(batch.x_BRW), batch.texts)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if not torch.isfinite(norm):
            raise LossNotFinite(
                f"The loss of step {number + 1} or its gradient is not finite; lower the learning "
                "rate and run it again.")
        self.optimizer.step(rate)
        return float(loss.detach())

    def _tensors(self) -> dict[str, torch.Tensor]:
        weights = {f"weights.{name}": value.detach()
                   for name, value in self.model.named_parameters()}
        return weights | self.optimizer.tensors

    def _save(self, run: Run, rate: float) -> None:
        record = state.Record(
            identity=self.identity, phase=(rate, False), losses=run.losses, seconds=run.seconds,
            tokens=run.tokens)
        state.save_state(self.folder / "state", record, self._tensors(), self.parallel)
        characters.write(self.model, self.folder)

    def _resume(self) -> Run:
        record = state.read_record(self.folder / "state")
        if record is None:
            return Run()
        if record.identity != self.identity:
            raise SettingError(
                f"{self.folder.name} was left by a run with other settings; repeat that one, or "
                "name another folder.")
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
        with whole_file(self.folder / _REPORT) as report:
            report.write((json.dumps(line, indent=1) + "\n").encode())


def _recent(run: Run) -> float:
    return float(np.mean(run.losses[-100:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.reader",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--fonts", type=Path, required=True,
                        help="fonts of python -m cloister.reference.fonts")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=ReaderSettings.minutes)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1,
                        help="processes that draw lines (default: %(default)s)")
    given = parser.parse_args(arguments)
    screen = Console(stderr=True)
    try:
        if given.data is None:
            raise SettingError("No data folder is named; pass --data or set CLOISTER_DATA.")
        if given.workers < 0:
            raise SettingError(f"workers is {given.workers}; it must be at least 0.")
        with disk_errors(given.out.name):
            given.out.mkdir(parents=True, exist_ok=True)
        mixture = Mixture.read(given.data)
        camera = Camera(
            mixture.texts(given.seed), fonts.faces(given.fonts, held_out=False))
        never_seen = Camera(
            mixture.held_out_texts, fonts.faces(given.fonts, held_out=True))
        samples = reading.samples(never_seen)
        torch.set_num_threads(1)
        train(
            characters.CharacterModel(characters.default(), given.seed), camera,
            ReaderSettings(minutes=given.minutes, seed=given.seed), given.out,
            workers=given.workers, measure=lambda model: reading.scores(model, samples),
            progress=lines(screen))
        report = json.loads((given.out / _REPORT).read_text("utf-8"))
        screen.print(reading.table({name: report[name] for name in samples}))
    except CloisterError as error:
        screen.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        screen.print("Stopped; the same command goes on from here.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
