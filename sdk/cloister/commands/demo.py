"""The whole way in about a minute: a Nano-1 is distilled from the shipped Pro, quantized to 4 bits,
exported, measured, and run beside the shipped tiers."""

from __future__ import annotations

import functools
import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister import display, reference
from cloister.commands import demo_model
from cloister.commands.make import exported, show_receipt
from cloister.commands.tour import Demo, Speed, ask, beginning, show_next, show_speeds
from cloister.files import check_output
from cloister.tiers import Tier, ladder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from cloister.commands.options import Record
    from cloister.corpus import Example
    from cloister.distill.schedule import Schedule
    from cloister.evaluate.subject import Media, Subject
    from cloister.model.checkpoint import Checkpoint

__all__ = ["Demo", "demo"]

SHOWN = 4  # requests
RECIPE = "8da4w-g32"
TASK = "redact"  # what the new Nano-1 is taught, and all that it is asked
# What a token of a step takes, in products, and all that is no training, in loops of Python (see
# `Speed`): fitted to runs on two cores of an AMD EPYC.
_PRODUCTS = 0.31
_LOOPS = 45_000


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is made and learnt from."""

    examples: int = 1600  # the steps read less than half: with 800 they learnt less
    held_out: int = 40
    calibration: int = 100  # of the examples, to prune by
    # Many small steps: 120 of 512 tokens redacted 90 % exactly, 80 of 1,024 72, 40 of 2,048 55.
    steps: int = 100
    steps_4bit: int = 20
    tokens: int = 512  # a step


def demo(args: Demo, sizes: Sizes | None = None) -> Record:
    """Go the whole way, on the shipped family or with the model that is named."""
    if args.model is not None:
        return demo_model.demo(args, args.model)
    if args.output is not None:
        check_output(args.output, kind="bundle", replace=args.force)
    requests = [
        json.loads(line) for line in reference.requests_path().read_text("utf-8").splitlines()
    ]
    with tempfile.TemporaryDirectory() as scratch, display.quiet(args.debug) as console:
        made = _Making(Path(scratch), console, sizes or Sizes())
        console.print(beginning(_seconds(made.sizes)))
        out = args.output or Path(scratch) / "nano-1.cloister"
        record: Record = {
            "distil": made.distil(), "bits_per_parameter": made.quantize(),
            "export": made.export(out, requests, replace=args.force), "measured": made.measure(out),
        }
        console.print("[bold]5. Run[/] it beside the shipped tiers, one at a time")
        bundles = {"nano-1, just made": out} | {
            str(tier): reference.bundle_path(tier) for tier in reversed(Tier)
            if reference.bundle_path(tier).is_dir()
        }
        answers = [
            ask(name, path, [
                row if path != out or row["system"] == TASK else None for row in requests
            ], debug=args.debug) for name, path in bundles.items()]
    if not args.json:
        _show_losses(record)
        show_receipt(record["export"])
        _show_answers(requests, answers)
        show_next(_next(args.output))
    return {**record, "tiers": answers}


class _Making:
    """A Nano-1 in the making, stage by stage, in the folder `scratch`."""

    def __init__(self, scratch: Path, console: Console, sizes: Sizes) -> None:
        from cloister.corpus import normalized
        from cloister.reference import redaction

        self.scratch, self.console, self.sizes = scratch, console, sizes
        self.held_out: list[Example] = list(
            redaction.generate(sizes.held_out, seed=1, development=True))
        apart = {normalized(each.input) for each in self.held_out}
        self.data = [
            each for each in redaction.generate(sizes.examples, seed=2)
            if normalized(each.input) not in apart
        ]

    def _schedule(self, steps: int, *, peak: float) -> Schedule:
        from cloister.distill.schedule import Schedule

        tokens = self.sizes.tokens
        return Schedule(
            steps=steps, tokens=tokens, micro=tokens, peak=peak, warmup=max(1, steps // 10))

    def distil(self) -> Record:
        """From Pro, on one task."""
        from cloister.distill.run import DistillReport, DistillSettings, distill
        from cloister.model.checkpoint import Checkpoint

        teacher = Checkpoint.open(reference.checkpoint_path("pro"))
        self.console.print(
            f"[bold]1. Distil[/] Pro ({display.count(teacher.metadata.config.shape.parameters)} "
            f"weights) to Nano-1 ({display.count(ladder()[Tier.NANO_1].parameters)}) on one task: "
            "personal data in invented sentences is redacted"
        )
        with display.progress(self.console, "nano-1") as progress:
            self.student: Checkpoint = distill(
                teacher, self.scratch / "nano-1", student=Tier.NANO_1, data=self.data,
                held_out=self.held_out, progress=progress, settings=DistillSettings(
                    schedule=self._schedule(self.sizes.steps, peak=4e-3),
                    calibration=self.sizes.calibration, allow_overlap=True))  # see `data`
        report = self.student.report
        assert isinstance(report, DistillReport)
        self.console.print(
            f"   held-out cross-entropy {report.before:.2f} \u2192 {report.after:.3f} nats a token "
            f"(Pro: {report.teacher:.3f})"
        )
        return report.to_dict()

    def quantize(self) -> float:
        """After the fact, and with training; return the bits a parameter."""
        from cloister.quantize.apply import QuantizeReport, quantize
        from cloister.quantize.train import QatSettings

        self.console.print("[bold]2. Quantize[/] it to 4 bits, after the fact and with training")
        with display.progress(self.console, RECIPE) as progress:
            self.after = quantize(self.student, self.scratch / "after", RECIPE, progress=progress)
            self.trained = quantize(
                self.student, self.scratch / "4bit", RECIPE, data=self.data, progress=progress,
                settings=QatSettings(schedule=self._schedule(self.sizes.steps_4bit, peak=2e-4)))
        assert isinstance(self.after.report, QuantizeReport)
        return self.after.report.bits_per_parameter

    def export(self, out: Path, requests: list[Record], *, replace: bool) -> Record:
        """With ExecuTorch, and check the program."""
        from cloister import pipeline

        self.console.print("[bold]3. Export[/] it with ExecuTorch, and check the program")
        with display.progress(self.console, "export") as progress:
            return exported(pipeline.export(
                self.trained, out, replace=replace, progress=progress,
                prompts=[
                    (row["system"], row["prompt"]) for row in requests if row["system"] == TASK]))

    def measure(self, out: Path) -> dict[str, dict[str, float]]:
        """What 4 bits cost, on the shipped program."""
        from cloister.evaluate.report import evaluate
        from cloister.evaluate.subject import open_subject

        self.console.print("[bold]4. Measure[/] what 4 bits cost, on the shipped program")
        itself, found = _Remembered(open_subject(self.student)), {}
        for title, subject in (
            ("in full precision", itself),
            ("4 bits, after the fact", open_subject(self.after)),
            ("4 bits, trained for, as exported", open_subject(out)),
        ):
            with display.progress(self.console, title) as progress:
                found[title] = evaluate(
                    subject, self.held_out, against=itself, progress=progress).metrics
        return found


class _Remembered:
    """A subject whose answers are computed once, whatever is measured against it."""

    def __init__(self, subject: Subject) -> None:
        self.name, self.tokenizer, self.eos = subject.name, subject.tokenizer, subject.eos
        self.context, self.vocabulary = subject.context, subject.vocabulary
        self.formats, self.logits = subject.formats, subject.logits
        self._answers = functools.cache(lambda prompts, limit, media: list(
            subject.answers([list(ids) for ids in prompts], limit, media)))

    def answers(
        self, prompts: Sequence[list[int]], limit: int, media: Media = ()
    ) -> Iterator[list[int]]:
        """Yield the answers, see `Subject`."""
        yield from self._answers(tuple(map(tuple, prompts)), limit, tuple(map(tuple, media)))


def _seconds(sizes: Sizes) -> float:
    """Return about how long it all takes here and now."""
    speed, tokens = Speed.measured(), (sizes.steps + 2 * sizes.steps_4bit) * sizes.tokens
    return tokens * _PRODUCTS * speed.product_s + _LOOPS * speed.python_s


def _show_losses(record: Record) -> None:
    display.table(
        "Held-out sentences", ("Nano-1", "redacted exactly", "mean KL divergence",
                                           "same token", "perplexity ratio", "flips"),
        [(
            title, f"{found['exact']:.0%}", f"{found['mean_kld']:.2g}", f"{found['top1']:.2%}",
            f"{found['ppl_ratio']:.3f}", f"{found['flips']:.0%}",
        ) for title, found in record["measured"].items()],
    )


def _show_answers(requests: list[Record], answers: list[Record]) -> None:
    for number in range(0, len(requests), -(-len(requests) // SHOWN)):
        row = requests[number]
        sampled = " (sampled; models so small know the words of tales, hardly their sense)"
        display.table(
            row["prompt"] + (sampled if row["system"] == "story" else ""), ("tier", "answer"),
            [(tier["tier"], tier["answers"][number]) for tier in answers
             if tier["answers"][number] is not None], texts=2,
        )
    show_speeds(f"{len(requests)} requests, some of them above", answers)


def _next(kept: Path | None) -> list[tuple[str, str]]:
    run = f'cloister run {shlex.quote(str(kept))} "Call me on 020 7946 0958." --system {TASK}'
    return [
        (run, "what was just made") if kept else (
            "cloister demo -o mine.cloister", "the same again, and keep what is made"),
        ("cloister chat nano-1 --system call", "talk to a shipped tier"),
        ("cloister import --list", "the models that this machine has already"),
        ("cloister demo --model NAME|FILE.gguf|HF_DIR -o mine.cloister",
         "one of them in 4 bits, or any that others made"),
        ("cloister import NAME|FILE.gguf|HF_DIR -o teacher; "
         "cloister distill --teacher teacher --tier nano-1 --data mine.jsonl -o student",
         "teach a smaller one what it is for"),
        ("cloister quantize student -o student-4bit; cloister export student-4bit -o mine.cloister",
         "4 bits, and a bundle that a phone can run"),
    ]
