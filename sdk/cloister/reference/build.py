"""The build of the reference family: `python -m cloister.reference.build --data DIR [--out DIR]`.

    OUT/tokenizer.json, chat_template.jinja   trained first, shared by every tier
    OUT/checkpoints/TIER/                     Ultra from the labels, each other from the tier above
    OUT/runs/TIER/                            metrics of every step; a killed run resumes from here
    OUT/quantized/TIER/                       8 bits; the Nano tiers 4, after QAT
    OUT/after/TIER/                           the Nano tiers in 4 bits without QAT
    OUT/family/TIER.cloister/                 quantized, exported, checked and measured
    OUT/TIER.json, MODEL_CARD.md              cost and scores

A stage whose result and record stand is not repeated. `family`, Pro's and Nano-1's `checkpoints`,
the records and the model card made of them are what the package ships.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cloister import pipeline
from cloister.bundle import Bundle, rewrite_receipt
from cloister.distill.loop import train
from cloister.distill.losses import Objective
from cloister.distill.parallel import Parallel, Sharded
from cloister.distill.run import Tensors, pruned, write, write_start
from cloister.distill.schedule import Schedule, TrainSettings
from cloister.errors import SettingError
from cloister.evaluate.report import evaluate
from cloister.evaluate.subject import BundleSubject, CheckpointSubject
from cloister.files import whole_file
from cloister.model.checkpoint import Checkpoint, Metadata
from cloister.model.config import ModelConfig
from cloister.model.device import device, multiplies_bfloat16
from cloister.model.transformer import initial_weights
from cloister.pairs import pairs
from cloister.progress import silent
from cloister.quantize.apply import QuantizeReport, quantize
from cloister.quantize.train import QatSettings, qat_schedule
from cloister.reference import console, mixture, requests_path, vocabulary
from cloister.reference.card import card
from cloister.settings import Settings
from cloister.tiers import Tier, ladder
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from cloister.corpus import Example
    from cloister.evaluate.subject import Subject
    from cloister.pairs import Pair
    from cloister.progress import Progress

__all__ = ["RUNGS", "Rung", "add_record", "main", "read_records"]


@dataclass(frozen=True, kw_only=True)
class Rung(TrainSettings):
    """The training settings of a tier."""

    teacher: Tier | None  # None: learns from the labels alone


_HALF = Objective(hard=0.5)
RUNGS = {
    Tier.ULTRA: Rung(
        teacher=None, objective=Objective(hard=1.0),
        schedule=Schedule(steps=4000, peak=4e-3, decay=0.6),
    ),
    Tier.PRO: Rung(
        teacher=Tier.ULTRA, objective=_HALF,
        schedule=Schedule(steps=1200, peak=4e-3, decay=0.8),
    ),
    Tier.NANO_2: Rung(
        teacher=Tier.PRO, objective=_HALF,
        schedule=Schedule(steps=1500, peak=4e-3, decay=0.8),
    ),
    Tier.NANO_1: Rung(
        teacher=Tier.NANO_2, objective=_HALF,
        schedule=Schedule(steps=2500, peak=5e-3, decay=0.8),
    ),
}
# From weights that an earlier run left, where a tier is given more time or other data.
FURTHER = Schedule(steps=1500, peak=3e-3, decay=1.0)
# From itself in full precision, with small steps (facts of Gemma 3's report, arXiv 2503.19786).
QAT = qat_schedule(Schedule(steps=600, peak=2e-4, warmup=20))
_EIGHT_BITS = "8da8w"


class _Builder:
    """The stages of the build, each of which leaves its result in `out`."""

    def __init__(
        self, data: Path, out: Path, *, seed: int = 0, steps: int | None = None,
        compiled: bool = True, begin: Path | None = None, mean: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.out, self.seed, self.steps = out, seed, steps
        self.compiled, self.begin, self.mean = compiled, begin, mean
        self.progress = progress
        self.mixture = mixture.Mixture.read(data)
        if begin is not None:
            if not (begin / "checkpoints").exists():
                raise SettingError(
                    "--begin holds no checkpoints; name the --out of an earlier run.")
            for name in ("tokenizer.json", "chat_template.jinja"):
                shutil.copyfile(begin / name, out / name)
        elif not (out / "chat_template.jinja").exists():
            vocabulary.train(out, mixture.vocabulary_texts(self.mixture))
        self.tokenizer = Tokenizer.from_files(out / "tokenizer.json", out / "chat_template.jinja")
        end = self.tokenizer.id_of("<|end|>")
        assert end is not None
        self.end = end

    @property
    def command(self) -> str:
        """The command line, without the names of folders."""
        words = ["python -m cloister.reference.build --data DIR", f"--seed {self.seed}"]
        if self.begin is not None:
            words.append("--begin EARLIER")
        if self.mean:
            words.append("--mean")
        if self.steps is not None:
            words.append(f"--steps {self.steps}")
        return " ".join(words)

    @cached_property
    def examples(self) -> list[Example]:
        """Training data of every tier."""
        return list(self.mixture.examples(mixture.PASSES, self.seed))

    @cached_property
    def pairs(self) -> list[Pair]:
        """Training data of every tier as token ids."""
        context = ladder()[Tier.NANO_1].context
        return pairs(self.tokenizer, self.examples, context, Tier.NANO_1)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer of every tier."""
        return self.out / "tokenizer.json"

    @property
    def template_path(self) -> Path:
        """The chat template of every tier."""
        return self.out / "chat_template.jinja"

    def schedule(self, schedule: Schedule) -> Schedule:
        """Return `schedule` with the seed, and the number of steps where one is given."""
        return replace(schedule, seed=self.seed, steps=self.steps or schedule.steps)

    def checkpoint(self, tier: Tier) -> Checkpoint:
        """Return the tier's weights, trained if they are not there."""
        path = self.out / "checkpoints" / tier
        if path.exists() and "training" in self._records(tier):
            return Checkpoint.open(path)
        rung, folder, parallel = RUNGS[tier], self.out / "runs" / tier, Parallel()
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        metadata = Metadata(name=tier, config=ModelConfig(shape=ladder()[tier]), eos=(self.end,))
        teacher = begun = start = None
        if rung.teacher is not None:
            parent = self.checkpoint(rung.teacher)
            teacher = Sharded.load(parent, parallel)
            metadata = replace(metadata, parent=parent.identity)
        if self.begin is not None and (self.begin / "checkpoints" / tier).exists():
            rung = replace(rung, schedule=FURTHER)
            start = Checkpoint.open(self.begin / "checkpoints" / tier)
            student = Sharded.load(start, parallel)
            begun = json.loads((self.begin / f"{tier}.json").read_text("utf-8"))["training"]
        else:
            weights: Tensors = initial_weights(metadata.config, self.seed)
            if teacher is not None:
                _, weights = pruned(parent, teacher, metadata.config.shape, self.pairs)
            student = write_start(folder, metadata, weights, self, parallel)
        rung = replace(rung, schedule=self.schedule(rung.schedule), compiled=self.compiled)
        run = train(
            student, self.pairs, rung, folder, teacher=teacher, stage=f"train {tier}",
            origin=f"{metadata.parent} {begun and begun['checkpoint']}", progress=self.progress)
        checkpoint = write(
            student, path, metadata, self, dtype=torch.bfloat16, replace=True,
            mean_with=start if self.mean else None)
        self._record(tier, "training", {
            "command": self.command, "checkpoint": checkpoint.identity, "steps": len(run.losses),
            "tokens": run.tokens, "seconds": round(run.seconds), "device": _device(),
            "torch": torch.__version__, "rung": asdict(rung), "seed": self.seed,
            "begun_from": begun,  # what was spent before
            "mean": self.mean and start is not None,  # of the weights begun from and those reached
            "losses": [round(loss, 4) for loss in run.losses[::20]],  # every twentieth step's
        })
        return checkpoint

    def quantized(self, tier: Tier) -> Checkpoint:
        """Return the tier in 8 bits, or in 4 after quantization-aware training."""
        path = self.out / "quantized" / tier
        if path.exists() and (
            not tier.four_bit or "quantization_aware_training" in self._records(tier)
        ):
            return Checkpoint.open(path)
        source = self.checkpoint(tier)
        path.parent.mkdir(exist_ok=True)
        if not tier.four_bit:
            return quantize(source, path, _EIGHT_BITS)
        after = self.out / "after" / tier
        after.parent.mkdir(exist_ok=True)
        quantize(source, after, replace=True)
        quantized = quantize(
            source, path, data=self.examples, settings=QatSettings(schedule=self.schedule(QAT)),
            replace=True, progress=self.progress)
        report = quantized.report
        assert isinstance(report, QuantizeReport) and report.run is not None
        self._record(tier, "quantization_aware_training", {
            "steps": len(report.run.losses), "seconds": round(report.run.seconds),
            "schedule": asdict(QAT),
            "losses": [round(loss, 5) for loss in report.run.losses[::20]],
        })
        return quantized

    def bundle(self, tier: Tier) -> Path:
        """Return the bundle of the tier, with its scores in the receipt."""
        path = self.out / "family" / f"{tier}.cloister"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            rows = [json.loads(line) for line in requests_path().read_text("utf-8").splitlines()]
            pipeline.export(
                self.quantized(tier), path,
                prompts=[(row["system"], row["prompt"]) for row in rows])
        if "evaluation" not in self._records(tier):
            reports = self._evaluated(tier, BundleSubject(path))
            bundle = Bundle.open(path)
            rewrite_receipt(bundle, {**bundle.receipt(), "evaluations": {
                f"{task}, development": {key: report[key] for key in ("n", "metrics", "errors")}
                for task, report in reports.items()
            }})
            self._record(tier, "evaluation", reports)
        if tier.four_bit and "post_training_quantization" not in self._records(tier):
            plain = CheckpointSubject(Checkpoint.open(self.out / "after" / tier))
            self._record(tier, "post_training_quantization", self._evaluated(tier, plain))
        return path

    def _evaluated(self, tier: Tier, subject: Subject) -> dict[str, dict[str, object]]:
        """Return scores by task, on development data, against the tier's unquantized self."""
        itself = CheckpointSubject(self.checkpoint(tier))
        return {
            task: evaluate(subject, examples, against=itself).to_dict()
            for task, examples in self.mixture.held_out.items()
        }

    def _records(self, tier: Tier) -> dict[str, Any]:
        return read_records(self.out, tier)

    def _record(self, tier: Tier, key: str, record: object) -> None:
        add_record(self.out, tier, key, record)


def read_records(out: Path, tier: Tier) -> dict[str, Any]:
    """Return the records of a tier."""
    path = out / f"{tier}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"tier": tier}


def add_record(out: Path, tier: Tier, key: str, record: object) -> None:
    """Add to the records of a tier, all of it or nothing."""
    with whole_file(out / f"{tier}.json") as file:
        file.write((json.dumps({**read_records(out, tier), key: record}, indent=1) + "\n").encode())


def _device() -> str:
    """Return the names of the device and of the number type that trained."""
    dtype = "bfloat16" if multiplies_bfloat16(device()) else "float32"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        f"{threads} processor core{'s' * (threads > 1)}")
    return f"{name}, {dtype}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.build", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--out", type=Path, default=Path("reference-family"),
                        help="folder to write to (default: %(default)s)")
    parser.add_argument("--tiers", default=",".join(Tier), help="comma-separated (%(default)s)")
    parser.add_argument("--steps", type=int, help="of every run, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=Path, metavar="OUT",
                        help="train the tiers further that an earlier run made there")
    console.add_mean(parser)
    parser.add_argument("--eager", action="store_true", help="compile nothing: for short runs")
    return console.run(_build, parser.parse_args(arguments))


def _build(given: argparse.Namespace, screen: Console) -> None:
    data, mean = console.data(given), console.mean(given)
    tiers = [Tier(name) for name in given.tiers.split(",") if ladder()[name]]
    given.out.mkdir(parents=True, exist_ok=True)
    builder = _Builder(
        data, given.out, seed=given.seed, steps=given.steps, compiled=not given.eager,
        begin=given.begin, mean=mean, progress=console.lines(screen))
    for tier in tiers:  # what takes hours, before what needs an idle machine
        builder.quantized(tier)
    for tier in tiers:
        screen.print(f"{tier}: {builder.bundle(tier).name} is ready")
    (given.out / "MODEL_CARD.md").write_text(card(given.out), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
