"""The commands that make a smaller model: distill and quantize."""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister import display
from cloister.commands.options import Options, Record, check_data, checkpoint
from cloister.errors import SettingError
from cloister.files import check_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console

    from cloister.corpus import Example, Split
    from cloister.distill.schedule import Schedule
    from cloister.distill.teacher import LogitStore
    from cloister.message import Message
    from cloister.progress import Progress
    from cloister.quantize.apply import QuantizeReport
    from cloister.tiers import Scale, Tier

__all__ = ["Distill", "Quantize", "distill", "quantize"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """The options of every command that trains."""

    output: Path
    force: bool
    data: Path | None
    split: Split | None
    held_out: Path | None
    allow_overlap: bool
    tolerate: float
    passes: float
    steps: int | None
    tokens: int
    micro: int
    rate: float
    dropout: float
    seed: int
    float32: bool
    compile: bool

    def schedule(self) -> Schedule:
        """Return the training schedule, whose bounds `Schedule` checks."""
        from cloister.distill.schedule import Schedule

        return Schedule(
            steps=self.steps, passes=self.passes, tokens=self.tokens,
            micro=min(self.tokens, self.micro), peak=self.rate, seed=self.seed,
            warmup=50 if self.steps is None else min(50, self.steps // 10), dropout=self.dropout,
            autocast=not self.float32,
        )


@dataclass(frozen=True, kw_only=True)
class Distill(TrainOptions):
    """The options of `cloister distill`."""

    teacher: Path
    tier: Tier
    size: Scale
    from_scratch: bool
    hard: float
    divergence: str
    temperature: float
    draws: int | None
    private: bool
    namespace: str
    own_answers: float
    unlabelled: Path | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class Quantize(TrainOptions):
    """The options of `cloister quantize`."""

    source: Path
    recipe: str
    qat: bool
    calibrate: str | None  # "self", "none", or a path
    sense_recipe: str
    media: Path | None


def distill(options: Distill) -> Record | None:
    """Distil a teacher into a student; None in a process that is not the first."""
    teacher = checkpoint(options.teacher)
    assert options.data is not None
    own = options.data == Path("self")
    if own and options.unlabelled is not None:
        raise SettingError(
            "--unlabelled goes with labelled data; name them, or leave it out with --data self.")
    for path in filter(None, (None if own else options.data, options.unlabelled)):
        check_data(path)
    check_output(options.output, kind="checkpoint", replace=options.force)
    with _console(options) as console, _sealing(options) as store:
        from cloister.distill import run
        from cloister.distill.examples import SELF
        from cloister.distill.losses import Divergence, Objective
        from cloister.distill.schedule import OnPolicy

        settings = run.DistillSettings(
            schedule=options.schedule(),
            objective=Objective(hard=options.hard, divergence=Divergence(options.divergence),
                                temperature=options.temperature),
            on_policy=OnPolicy(share=options.own_answers) if options.own_answers else None,
            compiled=options.compile, scale=options.size, from_scratch=options.from_scratch,
            draws=options.draws, store=store, allow_overlap=options.allow_overlap,
            tolerate=options.tolerate, samples=options.samples,
        )
        learnt, data = ([], {"samples": options.samples, "flaws": {}}) if own else (
            examples(options, options.data, console))
        held_out = _held_out(options, console, data)
        with display.progress(console, str(options.tier)) as progress:
            if options.unlabelled is not None:
                answers, data["unlabelled"] = _answered(
                    options, teacher, {each.messages for each in learnt}, progress)
                learnt += answers
                console.print(
                    f"Answered by the teacher: {len(answers)} of "
                    f"{data['unlabelled']['requests']} unlabelled requests.", highlight=False)
            student = run.distill(
                teacher, options.output, student=options.tier,
                data=SELF if own else learnt, held_out=held_out, settings=settings,
                replace=options.force, progress=progress)
        report = student.report
        assert isinstance(report, run.DistillReport)
        _say_too_long(console, options, report.too_long, data)
        path = run.run_folder(options.output) / "held-out.jsonl"
        if options.held_out is None and path.exists():
            console.print(
                f"What was held out of the data: {path.parent.name}/{path.name}.", markup=False)
        first = not console.quiet
    if not options.json and first:
        display.table(f"{options.output.name}: what the student learnt", ("", "measured"), [
            ("parameters", display.count(report.shape.parameters)),
            ("steps", str(len(report.run.losses))),
            ("tokens", display.count(report.run.tokens)),
            ("time", f"{report.run.seconds:.0f} s"),
            ("held-out cross-entropy: teacher", f"{report.teacher:.4f} nats a token"),
            ("student, before", f"{report.before:.4f}"),
            ("student, after", f"{report.after:.4f}"),
        ])
    return {**report.to_dict(), "data": data} if first else None


def quantize(options: Quantize) -> Record | None:
    """Quantize a checkpoint, and report every tensor; None in a process that is not the first."""
    source = checkpoint(options.source)
    check_output(options.output, kind="checkpoint", replace=options.force)
    if options.data is not None and not options.qat:
        raise SettingError("To train on --data add --qat; to calibrate on it write --calibrate.")
    calibrate: str | list[Example] | None = (
        None if options.calibrate == "none" else options.calibrate)
    on = None if calibrate in (None, "self") else Path(str(calibrate))
    for path in filter(None, (options.data, on, options.media)):
        check_data(path)
    with _console(options) as console:
        from cloister import corpus
        from cloister.quantize import apply
        from cloister.quantize.encoders import SenseOptions
        from cloister.quantize.train import QatSettings

        read: Record = {}
        learnt = settings = None
        if on is not None:
            calibrate, read["calibrated_on"] = examples(options, on, console)
        if options.data is not None:
            learnt, read["data"] = examples(options, options.data, console)
            held_out = _held_out(options, console, read["data"])
            if held_out is not None and not options.allow_overlap:
                corpus.refuse_overlap(learnt, held_out)
        if options.qat:
            settings = QatSettings(schedule=options.schedule(), compiled=options.compile,
                                   tolerate=options.tolerate)
        with display.progress(console, options.recipe) as progress:
            report = apply.quantize(
                source, options.output, options.recipe, data=learnt, settings=settings,
                calibrate=calibrate, replace=options.force, progress=progress,
                senses=SenseOptions(recipe=options.sense_recipe, media=options.media)).report
        assert isinstance(report, apply.QuantizeReport)
        if learnt is not None:
            _say_too_long(console, options, report.too_long, read["data"])
        first = not console.quiet
    if not options.json and first:
        _show_quantized(options, report)
    return {**report.to_dict(), **read} if first else None


def _show_quantized(options: Quantize, report: QuantizeReport) -> None:
    rows: dict[tuple[str, int, int | None], list[int]] = {}
    for row in report.rows:
        name = row.tensor.split(".", 2)[-1] if row.tensor.startswith("layers") else row.tensor
        entry = rows.setdefault((name, row.bits, row.group), [0, 0, 0])
        for at, more in enumerate((1, math.prod(row.shape), row.size_bytes)):
            entry[at] += more
    display.table(
        f"{options.recipe}: {report.bits_per_parameter:.2f} bits a parameter, "
        f"{display.bytes_text(report.size_bytes)}",
        ("tensor", "of them", "bits", "group", "entries", "size"),
        [(
            kind, str(number), str(bits), str(group or "row" if bits < 32 else "-"),
            display.count(entries), display.bytes_text(size),
        ) for (kind, bits, group), (number, entries, size) in rows.items()],
    )
    if report.layers:
        worst = max(layer.error for layer in report.layers) or 1.0
        display.table(
            "Error of the hidden state behind each layer",
            ("layer", "", "square error"), [(
                str(layer.layer), "█" * round(30 * layer.error / worst), f"{layer.error:.2%}",
            ) for layer in report.layers], texts=2)
    if report.senses:
        display.table("What reads pictures and recordings", (
            "sense", "recipe", "size", "calibrated on", "vectors off by"), [(
                each.sense, each.recipe, display.bytes_text(each.size_bytes),
                str(each.calibrated or "-"),
                "not measured" if each.error is None else f"{each.error:.2%}",
            ) for each in report.senses], texts=2)
    if (run := report.run) is not None:
        display.table(f"{options.output.name}: trained for {options.recipe}", ("", "measured"), [
            ("steps", str(len(run.losses))), ("time", f"{run.seconds:.0f} s"),
            ("divergence, first step", f"{run.losses[0]:.2g} nats a token"),
            ("divergence, last step", f"{run.losses[-1]:.2g}"),
        ])


@contextmanager
def _console(options: TrainOptions) -> Iterator[Console]:
    """Yield the console, which of several processes only the first writes to."""
    with display.quiet(options.debug) as console:
        from cloister.distill.parallel import Parallel

        console.quiet = Parallel().rank > 0
        yield console


@contextmanager
def _sealing(options: Distill) -> Iterator[Callable[[Mapping[str, str | int]], LogitStore] | None]:
    """Yield the maker of the sealed store of the teacher's draws, or None without `--private`.

    Raises:
        SettingError: none are to be recorded.
    """
    if not options.private:
        yield None
        return
    if options.draws is None:
        raise SettingError("Only recorded draws need sealing; add --draws, or leave --private out.")
    from cloister.commands.vault import asking
    from cloister.distill.teacher import SealedStore
    from cloister.vault.local import open_vault
    from cloister.vault.namespace import Kind

    with open_vault(asking(), create=True, notify=display.note) as vault:
        yield functools.partial(SealedStore, vault.namespace(options.namespace), Kind.DISTILL)


def examples(
    options: TrainOptions, path: Path, console: Console
) -> tuple[list[Example], Record]:
    """Return the data to learn from, with what was read and what left out, and say so."""
    from cloister.corpus import LEARN, load, select

    selection = select(path, LEARN, options.split)
    console.print(f"To learn from: {selection}", markup=False, highlight=False)
    corpus = load(selection, tolerated=options.tolerate)
    if corpus.flaws:
        counts = ", ".join(f"{count} {kind}" for kind, count in corpus.count().items())
        places = ", ".join(map(str, corpus.flaws[:5]))
        console.print(f"Left out of {path.name}: {counts} (first {places}).", markup=False)
    return list(corpus.examples), {**selection.to_dict(), "flaws": corpus.count()}


def _say_too_long(
    console: Console, options: TrainOptions, places: Sequence[str], data: Record
) -> None:
    """Say what the context did not hold, and put its number into `data`."""
    if places:
        assert options.data is not None
        data["flaws"]["too long"] = len(places)
        first = ", ".join(list(dict.fromkeys(places))[:5])
        console.print(f"Left out of {options.data.name}: {len(places)} longer than the context "
                      f"(first {first}).", markup=False, highlight=False)


def _held_out(
    options: TrainOptions, console: Console, data: Record
) -> list[Example] | None:
    """Return the data to measure on, where some is named, and say so, in `data` too."""
    from cloister.corpus import MEASURE, read, select

    if options.held_out is None:
        return None
    selection = select(options.held_out, MEASURE, choice=False)
    console.print(f"To measure on: {selection}", markup=False, highlight=False)
    data["held_out"] = selection.to_dict()
    return read(selection)


def _answered(
    options: Distill, teacher: Path, labelled: set[tuple[Message, ...]], progress: Progress
) -> tuple[list[Example], Record]:
    """Return the teacher's answers to the unlabelled requests, but those that have a label."""
    from cloister.corpus import LEARN, load, select
    from cloister.distill.answers import answered
    from cloister.model.checkpoint import Checkpoint

    assert options.unlabelled is not None
    selection = select(options.unlabelled, LEARN, choice=False)
    corpus = load(selection, tolerated=options.tolerate, answered=False)
    requests = list({
        each.messages: each for each in corpus.examples if each.messages not in labelled}.values())
    answers = answered(Checkpoint.open(teacher), requests, progress=progress)
    return answers, {**selection.to_dict(), "flaws": corpus.count(), "requests": len(requests),
                     "answered": len(answers)}
