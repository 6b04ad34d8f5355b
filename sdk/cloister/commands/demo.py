"""The whole way in a few minutes: a Nano-1 is distilled from the shipped Pro, quantized to 4 bits,
exported, measured, and run beside the shipped tiers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import display, reference
from cloister.commands.make import export_bundle, show_receipt
from cloister.commands.teach import showing
from cloister.runtime.client import Worker
from cloister.tiers import Tier, ladder

if TYPE_CHECKING:
    from argparse import Namespace

    from rich.console import Console

    from cloister.evaluate.report import Report

__all__ = ["demo"]

Record = dict[str, Any]

EXAMPLES, HELD_OUT = 6000, 60
STEPS, STEPS_4BIT, TOKENS = 100, 20, 2048
SHOWN = 4  # requests
RECIPE = "8da4w-g32"


def demo(args: Namespace) -> Record:
    """The whole way on the shipped family."""
    requests = [
        json.loads(line) for line in reference.requests_path().read_text("utf-8").splitlines()
    ]
    with tempfile.TemporaryDirectory() as scratch, display.quiet(args.debug) as console:
        out = args.output or Path(scratch) / "nano-1.cloister"
        record = _make(Path(scratch), out, requests, console, force=args.force)
        console.print("[bold]5. Run[/] it beside the shipped tiers, one at a time")
        bundles = {"nano-1, just made": out} | {
            str(tier): reference.bundle_path(tier) for tier in reversed(Tier)
            if reference.bundle_path(tier).is_dir()
        }
        answers = [_answers(name, path, requests, args.debug) for name, path in bundles.items()]
    if not args.json:
        _show_losses(record)
        show_receipt(record["export"])
        _show_answers(requests, answers)
    return {**record, "tiers": answers}


def _make(
    scratch: Path, out: Path, requests: list[Record], console: Console, *, force: bool
) -> Record:
    from cloister.corpus import normalized
    from cloister.distill.run import DistillReport, DistillSettings, distill
    from cloister.distill.schedule import Schedule
    from cloister.evaluate.report import evaluate
    from cloister.evaluate.subject import BundleSubject, CheckpointSubject
    from cloister.model.checkpoint import Checkpoint
    from cloister.quantize.apply import QuantizeReport, quantize
    from cloister.quantize.train import QatSettings
    from cloister.reference import redaction

    teacher = Checkpoint.open(reference.checkpoint_path("pro"))
    shape = ladder()[Tier.NANO_1]
    held_out = list(redaction.generate(HELD_OUT, seed=1, development=True))
    apart = {normalized(each.input) for each in held_out}
    data = [
        each for each in redaction.generate(EXAMPLES, seed=2) if normalized(each.input) not in apart
    ]
    console.print(
        f"[bold]1. Distil[/] Pro ({display.count(teacher.metadata.config.shape.parameters)} "
        f"weights) to Nano-1 ({display.count(shape.parameters)}) on one task: personal data in "
        "invented sentences is redacted"
    )
    with showing(console) as progress:
        student = distill(
            teacher, scratch / "nano-1", student=Tier.NANO_1, data=data, held_out=held_out,
            settings=DistillSettings(schedule=Schedule(steps=STEPS, tokens=TOKENS, warmup=10)),
            progress=progress)
    outcome = student.report
    assert isinstance(outcome, DistillReport)
    console.print(
        f"   held-out cross-entropy {outcome.before:.2f} \u2192 {outcome.after:.3f} nats a token "
        f"(Pro: {outcome.teacher:.3f})"
    )
    console.print("[bold]2. Quantize[/] it to 4 bits, after the fact and with training")
    with showing(console) as progress:
        sizes = quantize(student, scratch / "after", RECIPE, progress=progress).report
        quantize(
            student, scratch / "4bit", RECIPE, data=data, progress=progress, settings=QatSettings(
                schedule=Schedule(steps=STEPS_4BIT, tokens=TOKENS, peak=2e-4, warmup=5)))
    assert isinstance(sizes, QuantizeReport)
    console.print("[bold]3. Export[/] it with ExecuTorch, and check the program")
    exported = export_bundle(
        Checkpoint.open(scratch / "4bit"), out, console, replace=force,
        golden=[(row["system"], row["prompt"]) for row in requests],
    )
    console.print("[bold]4. Measure[/] what 4 bits cost, on the shipped program")
    itself = CheckpointSubject(student)
    lost: dict[str, Report] = {}
    for title, subject in (
        ("in full precision", itself),
        ("4 bits, after the fact", CheckpointSubject(Checkpoint.open(scratch / "after"))),
        ("4 bits, trained for, as exported", BundleSubject(out)),
    ):
        with display.counting(console, title) as progress:
            lost[title] = evaluate(subject, held_out, against=itself, progress=progress)
    return {
        "distil": outcome.to_dict(), "bits_per_parameter": sizes.bits_per_parameter,
        "export": exported,
        "measured": {title: report.metrics for title, report in lost.items()},
    }


def _answers(name: str, path: Path, requests: list[Record], debug: bool) -> Record:
    with Worker(debug=debug) as worker:
        loaded = worker.load(path)
        answers = []
        for row in requests:
            worker.forget()
            stream = worker.stream(row["prompt"], system=row["system"], max_tokens=128)
            answers.append({"text": "".join(piece.text for piece in stream), **worker.stats})
    speeds = sorted(a["decode_tokens_per_s"] or 0.0 for a in answers)
    return {
        "tier": name, "bundle_bytes": sum(f.stat().st_size for f in path.iterdir()),
        "load_s": loaded["load_s"], "peak_rss_bytes": worker.stats["peak_rss_bytes"],
        "decode_tokens_per_s": speeds[len(speeds) // 2],
        "answers": [answer["text"] for answer in answers],
    }


def _show_losses(record: Record) -> None:
    display.table(
        f"{HELD_OUT} held-out sentences", ("Nano-1", "redacted exactly", "mean KL divergence",
                                           "same token", "perplexity ratio", "flips"),
        [(
            title, f"{found['exact']:.0%}", f"{found['mean_kld']:.2g}", f"{found['top1']:.2%}",
            f"{found['ppl_ratio']:.3f}", f"{found['flips']:.0%}",
        ) for title, found in record["measured"].items()],
    )


def _show_answers(requests: list[Record], answers: list[Record]) -> None:
    for number in range(0, len(requests), -(-len(requests) // SHOWN)):
        display.table(
            requests[number]["prompt"], ("tier", "answer"),
            [(tier["tier"], tier["answers"][number]) for tier in answers], texts=2,
        )
    display.table(
        f"{len(requests)} requests, some of them above",
        ("tier", "bundle", "ready in", "tokens/s", "peak memory"),
        [(
            tier["tier"], display.bytes_text(tier["bundle_bytes"]), f"{tier['load_s']:.2f} s",
            f"{tier['decode_tokens_per_s']:,.0f}", display.bytes_text(tier["peak_rss_bytes"]),
        ) for tier in answers],
    )
