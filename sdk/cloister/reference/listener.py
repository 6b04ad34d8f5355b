"""Training of the encoder of sound, on letters (CTC).

    python -m cloister.reference.listener --cache DIR --minutes 120 -o OUT

    OUT/utterances.jsonl            what is trained on: what the cache held when the run began
    OUT/state/                      weights and optimizer; the same command goes on from here
    OUT/metrics.jsonl               loss, now and then; scores on voices never heard and on people
    OUT/model.safetensors           the weights so far, `encoder.` and `letters.`
    OUT/model.json                  their shape

Minutes are of the processor, all runs together. The recordings of people are only measured with.
Every batch is drawn by its number, so a run that is stopped goes on with the same ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from cloister import records
from cloister.distill import state
from cloister.distill.loop import Run, graceful_interrupt
from cloister.distill.optimizer import Optimizer
from cloister.distill.parallel import Parallel
from cloister.distill.schedule import Kind, Schedule
from cloister.errors import CloisterError, DataError, LossNotFinite, SettingError, TrainingError
from cloister.files import disk_errors, whole_file
from cloister.progress import silent
from cloister.reference import acoustics, hearing, utterances
from cloister.reference.console import lines
from cloister.reference.ctc import CtcConfig, CtcModel
from cloister.reference.speech import RATE, Engine
from cloister.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from cloister.progress import Progress
    from cloister.reference.utterances import Utterance

__all__ = ["ListenerSettings", "load", "main", "train", "write"]

_POOL = 32  # batches whose recordings are sorted by length together
_NATURAL = 0.3  # share of a pass that is Kokoro's, the most natural, as far as
_REPEATED = 8  # times that each of its recordings may come in one
_WEIGHTS, _SHAPE, _METRICS = "model.safetensors", "model.json", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class ListenerSettings:
    """How long and how fast the encoder learns.

    Raises:
        SettingError: a value outside its bound.
    """

    minutes: float = 120.0  # of the processor
    steps: int | None = None  # in place of minutes
    rows: int = 8  # recordings a step
    peak: float = 5e-3  # learning rate
    optimizer: Kind = Kind.MUON
    warmup: int = 100  # steps
    decay: float = 0.4  # share of the run, the last one, in which the rate falls
    final: float = 0.02  # share of the peak at which it ends
    easy: float = 0.1  # share of the run, the first one, with little silence
    clip: float = 1.0  # norm of the gradient
    seed: int = 0
    save_every_s: float = 180.0
    measure_every_s: float = 900.0

    def __post_init__(self) -> None:
        for name in ("minutes", "peak", "clip", "save_every_s", "measure_every_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("rows", "warmup"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("decay", "final", "easy"):
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
    model: CtcModel, cache: Path, data: Sequence[Utterance], settings: ListenerSettings,
    folder: Path, *, measure: Callable[[CtcModel], dict[str, object]] | None = None,
    origin: str = "", progress: Progress = silent,
) -> Run:
    """Train `model` in place on recordings in `cache`; write state, metrics and weights.

    After a stop the run goes on from `folder`, if settings, data and `origin`, what the model
    began as, are the same. `measure` is asked for scores now and then, and at the end.

    Raises:
        DataError: no data, or a recording cannot be read.
        SettingError: the state is another run's.
        LossNotFinite: the loss is NaN or infinite; the state holds the last good weights.
        NotEnoughDisk, OutputUnwritable: a file of the run cannot be written.
        TrainingError: the state cannot be read.
    """
    if not data:
        raise DataError("There are no recordings to train on; make them first.")
    return _Training(model, cache, data, settings, folder, measure, origin).run(progress)


class _Training:
    """One run of `train`."""

    def __init__(
        self, model: CtcModel, cache: Path, data: Sequence[Utterance],
        settings: ListenerSettings, folder: Path,
        measure: Callable[[CtcModel], dict[str, object]] | None, origin: str,
    ) -> None:
        self.model, self.data, self.settings, self.folder = model, data, settings, folder
        self.measure = measure
        self.batches = _Batches(cache, data, settings, model.config)
        self.optimizer = Optimizer(model, Schedule(
            peak=settings.peak, optimizer=settings.optimizer, autocast=False,
        ), blocks="encoder.layers")
        self.parallel = Parallel()
        digest = hashlib.sha256("\n".join(each.file for each in data).encode()).hexdigest()
        schedule = replace(settings, minutes=1, steps=None, save_every_s=1, measure_every_s=1)
        self.identity = json.dumps(
            [asdict(schedule), asdict(model.config), digest, origin], sort_keys=True)

    def run(self, progress: Progress) -> Run:
        settings = self.settings
        run = self._resume()
        saved = measured = run.seconds
        began = time.process_time() - run.seconds
        self.model.train()
        with graceful_interrupt() as interrupted:
            plans = islice(self.batches.plans(), len(run.losses), None)
            while settings.done(run) < 1:
                rate = settings.rate(run)
                loss = self._learn(next(plans), len(run.losses), settings.done(run), rate)
                run.losses.append(loss)
                run.seconds = time.process_time() - began
                progress("listen", min(1000, int(1000 * settings.done(run))), 1000,
                         f"step {len(run.losses):,}, loss {_recent(run):.3f}")
                last = settings.done(run) >= 1
                if last or interrupted() or run.seconds - saved >= settings.save_every_s:
                    saved = run.seconds
                    self._save(run, rate)
                if self.measure is not None and (
                    last or run.seconds - measured >= settings.measure_every_s
                ):
                    measured = run.seconds
                    self._record({
                        "minutes": round(run.seconds / 60, 1), "steps": len(run.losses),
                        "loss": round(_recent(run), 4), **self.measure(self.model)})
                    self.model.train()
                    began = time.process_time() - run.seconds
                if interrupted() and not last:
                    raise KeyboardInterrupt
        self.model.eval()
        return run

    def _learn(
        self, rows: Sequence[int], number: int, done: float, rate: float
    ) -> float:
        """Make one step; return its loss."""
        rng = np.random.default_rng((self.settings.seed, number))
        x_BN = self.batches.recordings(rows, rng, easy=done < self.settings.easy)
        x_B1RT = self.model.spectrum(torch.from_numpy(x_BN))
        _mask(x_B1RT, rng)
        loss = self.model.loss(x_B1RT, [self.data[row].words for row in rows])
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
            tokens=0)
        state.save_state(self.folder / "state", record, self._tensors(), self.parallel)
        write(self.model, self.folder)

    def _resume(self) -> Run:
        record = state.read_record(self.folder / "state")
        if record is None:
            return Run()
        if record.identity != self.identity:
            raise SettingError(
                f"{self.folder.name} was left by a run with other settings or data; repeat that "
                "one, or name another folder.")
        state.load_state(self.folder / "state", self._tensors(), self.parallel)
        return Run(losses=record.losses, seconds=record.seconds)

    def _record(self, line: dict[str, object]) -> None:
        path = self.folder / _METRICS
        with disk_errors(path.name), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class _Batches:
    """Which recordings a step learns from, and what they sound like this time."""

    def __init__(
        self, cache: Path, data: Sequence[Utterance], settings: ListenerSettings, config: CtcConfig
    ) -> None:
        self.cache, self.data, self.settings, self.config = cache, data, settings, config
        self.lengths = np.array([utterances.length(cache, each) for each in data])
        natural = [row for row, each in enumerate(data) if each.engine is Engine.KOKORO]
        wanted = (len(data) - len(natural)) * _NATURAL / (1 - _NATURAL)
        times = min(_REPEATED, round(wanted / max(1, len(natural))))
        self.rows = np.array([*range(len(data)), *natural * max(0, times - 1)])

    def plans(self) -> Iterator[list[int]]:
        """Yield the rows of each step, of about one length each."""
        rows, number = self.settings.rows, 0
        while True:
            rng = np.random.default_rng((self.settings.seed, number, 1))
            order = rng.permutation(self.rows)
            plans: list[list[int]] = []
            for at in range(0, len(order), rows * _POOL):
                pool = order[at:at + rows * _POOL]
                pool = pool[np.argsort(self.lengths[pool], kind="stable")]
                plans += [pool[begin:begin + rows].tolist() for begin in range(0, len(pool), rows)]
            rng.shuffle(plans)
            yield from plans
            number += 1

    def recordings(
        self, rows: Sequence[int], rng: np.random.Generator, *, easy: bool
    ) -> NDArray[np.float32]:
        """Return recordings of one length, float32[B, N], most with seconds of silence."""
        spoken = [
            acoustics.at_speed(self._speech(row), float(rng.uniform(0.85, 1.2))) for row in rows]
        silence = rng.uniform(0.1, 1.0) if easy or rng.random() < 0.35 else rng.uniform(1.0, 6.0)
        stride = self.config.stride
        length = max(map(len, spoken)) + int(silence * RATE)
        length = min(-(-length // stride) * stride, self.config.longest)
        others = [self._speech(int(row)) for row in rng.integers(len(self.data), size=4)]
        return np.stack([
            acoustics.record(each[:length], length, rng, others=others) for each in spoken])

    def _speech(self, row: int) -> NDArray[np.float32]:
        return utterances.samples(self.cache, self.data[row])


def _mask(x_B1RT: torch.Tensor, rng: np.random.Generator) -> None:
    """Cover stripes of bins and of frames (SpecAugment, arXiv 1904.08779)."""
    bins, frames = x_B1RT.shape[2:]
    for x_1RT in x_B1RT:
        mean = float(x_1RT.mean())
        for _ in range(2):
            width = int(rng.integers(bins // 6 + 1))
            at = int(rng.integers(bins - width + 1))
            x_1RT[:, at:at + width] = mean
            width = int(rng.integers(min(25, frames // 8) + 1))
            at = int(rng.integers(frames - width + 1))
            x_1RT[:, :, at:at + width] = mean


def _recent(run: Run) -> float:
    return float(np.mean(run.losses[-100:]))


def write(model: CtcModel, folder: Path) -> None:
    """Write the weights and what they are the weights of.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`.
    """
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    with whole_file(folder / _WEIGHTS) as file:
        file.write(save(weights))
    with whole_file(folder / _SHAPE) as file:
        file.write(records.to_json(model.config).encode())


def load(folder: Path) -> CtcModel:
    """Read what `write` wrote; it is the same model.

    Raises:
        TrainingError: it cannot be read.
    """
    def refuse(why: str) -> TrainingError:
        return TrainingError(f"{folder.name} holds no encoder of sound ({why}); train it again.")

    try:
        config = records.decode(
            (folder / _SHAPE).read_bytes(), CtcConfig, limit_bytes=1 << 16, refuse=refuse)
        model = CtcModel(config)
        model.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise refuse(type(error).__name__) from None
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.listener",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--cache", type=Path, required=True,
                        help="recordings of python -m cloister.reference.utterances")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=ListenerSettings.minutes)
    parser.add_argument("--begin", type=Path, metavar="OUT",
                        help="train further what was made there")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    screen = Console(stderr=True)
    try:
        if given.data is None:
            raise SettingError("No data folder is named; pass --data or set CLOISTER_DATA.")
        with disk_errors(given.out.name):
            given.out.mkdir(parents=True, exist_ok=True)
        planned = utterances.present(given.cache, utterances.read_plan(given.cache))
        measured = [each for each in planned if each.part == "measure"]
        if not (given.out / utterances.PLAN).exists():
            utterances.write_plan(given.out, [each for each in planned if each.part == "train"])
        data = utterances.read_plan(given.out)
        folder = given.data / "spoken_orders"

        def measure(model: CtcModel) -> dict[str, object]:
            return {
                "people": hearing.people(model, folder, trim=False),
                "people, trimmed": hearing.people(model, folder, trim=True),
                "voices never heard": hearing.synthesized(model, given.cache, measured),
            }

        torch.set_num_threads(1)
        model = CtcModel(CtcConfig.default(), given.seed) if given.begin is None else load(
            given.begin)
        origin = "" if given.begin is None else hashlib.sha256(
            (given.begin / _WEIGHTS).read_bytes()).hexdigest()
        train(model, given.cache, data, ListenerSettings(minutes=given.minutes, seed=given.seed),
              given.out, measure=measure, origin=origin, progress=lines(screen))
    except CloisterError as error:
        screen.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        screen.print("Stopped; the same command goes on from here.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
