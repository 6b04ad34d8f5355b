"""The whole way with a model that others made: imported, calibrated for 4 bits, exported, measured
on what it says itself, and run beside what it was."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cloister import display
from cloister.commands.make import exported, find_source, show_receipt
from cloister.commands.tour import (
    MAX_TOKENS,
    Demo,
    Speed,
    ask,
    beginning,
    show_next,
    show_speeds,
)
from cloister.errors import DataError
from cloister.files import check_output

if TYPE_CHECKING:
    from rich.console import Console

    from cloister.commands.options import Record
    from cloister.model.checkpoint import Checkpoint

__all__ = ["demo"]

RECIPE = "8da4w-g32"
CONTEXT = 2048  # tokens: longer ones take memory that a demo does not need
SHOWN = 4  # answers
PROMPTS = (
    "What is the capital of France?", "Tell me a story about a fox who lived beside a river.",
    "Explain in two sentences why the sky is blue.", "Name three planets.",
    "What is seven times eight?", "Give me three ideas for a rainy Sunday.",
    "Write a short and polite email that asks for a day off.", "How do I boil an egg?",
)
# What a weight takes, in products, and all else, in loops of Python (see `Speed`): fitted to
# SmolLM2-135M-Instruct on two cores of an AMD EPYC.
_PRODUCTS = 5.5e-3
_LOOPS = 20_000


def demo(args: Demo, model: Path) -> Record:
    """Go the whole way with `model`, a directory, a file, or a name out of `import --list`."""
    source, title = find_source(model)
    if args.output is not None:
        check_output(args.output, kind="bundle", replace=args.force)
    with tempfile.TemporaryDirectory() as scratch, display.quiet(args.debug) as console:
        from cloister.model import imports

        shape, speed = imports.check(source).shape, Speed.measured()
        seconds = shape.parameters * _PRODUCTS * speed.product_s + _LOOPS * speed.python_s
        console.print(beginning(seconds, f" for {display.count(shape.parameters)} weights"))
        making = _Making(Path(scratch), console)
        record: Record = {
            "import": making.import_(source, title, min(CONTEXT, shape.context)),
            "quantize": making.quantize(),
        }
        out = args.output or Path(scratch) / "mine.cloister"
        record |= {"export": making.export(out, replace=args.force)}
        before, record["measured"] = making.measure(out)
        console.print("[bold]5. Run[/] it in a process of its own")
        asked = ask(making.name, out, [
            {"system": None, "prompt": prompt} for prompt in PROMPTS], debug=args.debug)
    if not args.json:
        _show(record, before, asked)
        show_next(_next(model, args.output))
    return {**record, "prompts": list(PROMPTS), "answers_before": before, "bundle": asked}


class _Making:
    """A bundle in the making out of a model that others made, in the folder `scratch`."""

    def __init__(self, scratch: Path, console: Console) -> None:
        self.scratch, self.console = scratch, console

    def import_(self, source: Path, title: str | None, context: int) -> Record:
        """Read it."""
        from cloister.model.imports import import_model

        self.console.print("[bold]1. Import[/] it")
        with display.progress(self.console, "import") as progress:
            self.imported: Checkpoint = import_model(
                source, self.scratch / "model", name=title, context=context, progress=progress)
        metadata = self.imported.metadata
        self.name = metadata.name
        if not metadata.eos:
            raise DataError(
                f"{self.name} names no token that ends an answer, so that there is none to show; "
                "begin with a directory whose generation_config.json does.")
        assert metadata.origin is not None
        return {"name": self.name, "parameters": metadata.config.shape.parameters,
                "source": metadata.origin.to_dict()}

    def quantize(self) -> Record:
        """To 4 bits, for what its layers read of texts that it samples itself."""
        from cloister.quantize.apply import QuantizeReport, quantize

        self.console.print("[bold]2. Quantize[/] it to 4 bits, calibrated on what it says itself")
        with display.progress(self.console, RECIPE) as progress:
            self.quantized = quantize(
                self.imported, self.scratch / "4bit", RECIPE, calibrate="self", progress=progress)
        report = self.quantized.report
        assert isinstance(report, QuantizeReport)
        return {"recipe": RECIPE, "bits_per_parameter": report.bits_per_parameter}

    def export(self, out: Path, *, replace: bool) -> Record:
        """With ExecuTorch, and check the program."""
        from cloister import pipeline

        self.console.print("[bold]3. Export[/] it with ExecuTorch, and check the program")
        with display.progress(self.console, "export") as progress:
            return exported(
                pipeline.export(self.quantized, out, replace=replace, progress=progress))

    def measure(self, out: Path) -> tuple[list[str], dict[str, float]]:
        """Return its answers before, and what 4 bits cost on them, on the shipped program."""
        from cloister.evaluate.report import evaluate
        from cloister.evaluate.subject import open_subject
        from cloister.example import CHAT, Example
        from cloister.message import Message

        self.console.print("[bold]4. Measure[/] what 4 bits cost, on what it says without")
        itself = open_subject(self.imported)
        with display.progress(self.console, "in full precision") as progress:
            progress("answers", 0, len(PROMPTS))
            ids = [itself.tokenizer.encode_chat([Message(role="user", content=prompt)])
                   for prompt in PROMPTS]
            answers = [itself.tokenizer.decode(answer)
                       for answer in itself.answers(ids, min(MAX_TOKENS, itself.context // 4))]
        said = [
            Example(task=CHAT, input=prompt, target=answer,
                    turns=(Message(role="user", content=prompt),))
            for prompt, answer in zip(PROMPTS, answers, strict=True) if answer.strip()]
        if not said:
            raise DataError(f"{self.name} answers nothing to {len(PROMPTS)} requests; try another.")
        with display.progress(self.console, "4 bits, as exported") as progress:
            return answers, evaluate(
                open_subject(out), said, against=itself, progress=progress).metrics


def _show(record: Record, before: list[str], asked: Record) -> None:
    found = record["measured"]
    display.table("What 4 bits cost, on what it says in full precision", ("", "measured"), [
        ("bits a parameter", f"{record['quantize']['bits_per_parameter']:.2f}"),
        ("mean KL divergence", f"{found['mean_kld']:.2g} nats"),
        ("same most likely token", f"{found['top1']:.1%}"),
        ("perplexity ratio", f"{found['ppl_ratio']:.3f}"),
    ])
    show_receipt(record["export"])
    for prompt, was, now in zip(PROMPTS[:SHOWN], before, asked["answers"], strict=False):
        display.table(prompt, ("weights", "answer"), [
            ("full precision", was), ("4 bits", now)], texts=2)
    show_speeds(f"{len(PROMPTS)} requests, some of them above", [asked])


def _next(model: Path, kept: Path | None) -> list[tuple[str, str]]:
    name = shlex.quote(str(model))
    bundle = "mine.cloister" if kept is None else shlex.quote(str(kept))
    again = (f"cloister demo --model {name} -o {bundle}", "the same again, and keep what is made")
    return [
        *([] if kept else [again]),
        (f"cloister chat {bundle}", "talk to it"),
        (f"cloister verify {bundle}", "prove it, on this machine or another"),
        (f"cloister import {name} -o model; cloister quantize model --calibrate mine.jsonl -o 4bit",
         "calibrate it on texts of your own"),
        ("cloister quantize model --qat --data mine.jsonl -o 4bit",
         "train it for its 4 bits, which costs less of what it knows"),
        ("cloister distill --teacher model --tier nano-1 --data mine.jsonl -o student",
         "teach a smaller one what it is for"),
    ]
