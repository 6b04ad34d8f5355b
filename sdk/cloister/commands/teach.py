"""Commands that train: a student from its teacher, and a checkpoint to bear 4 bits."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cloister import display
from cloister.errors import SettingError
from cloister.tiers import ladder

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from rich.console import Console

    from cloister.corpus import Example
    from cloister.distill.data import Pair
    from cloister.distill.schedule import Schedule
    from cloister.vault.namespace import Namespace as Space

__all__ = ["distill", "quantize_aware"]

Record = dict[str, Any]


def distill(args: Namespace) -> Record:
    """Teach a student what a teacher knows."""
    with display.quiet(args.debug) as console:
        _lead(args, console)
        return _distill(args, console)


def _distill(args: Namespace, console: Console) -> Record:
    from cloister import training
    from cloister.distill.losses import Divergence, Objective
    from cloister.distill.schedule import OnPolicy
    from cloister.model.checkpoint import Checkpoint

    teacher = Checkpoint.open(args.teacher)
    config = teacher.metadata.config
    shape = replace(
        ladder(args.size)[args.tier], vocab_size=config.shape.vocab_size,
        context=min(config.shape.context, ladder(args.size)[args.tier].context),
        tied=config.shape.tied,
    )
    examples, held_out = _examples(args, console)
    data, kept = (
        training.encode(teacher, each, shape.context) for each in (examples, held_out))
    schedule = _schedule(args, data, shape.context)
    objective = Objective(
        hard=args.hard, divergence=Divergence(args.divergence), temperature=args.temperature)
    with _private(args) as space:
        outcome = training.distill(
            teacher, args.output, shape=shape, name=args.tier, data=data, held_out=kept,
            schedule=schedule, objective=objective, draws=args.draws, space=space,
            on_policy=OnPolicy(share=args.own_answers) if args.own_answers else None,
            from_scratch=args.from_scratch, compiled=args.compile, replace_existing=args.force,
            console=console,
        )
    if args.held_out is None and not args.private and not args.silent:
        _keep(args, held_out, console)
    record = outcome.to_dict()
    if not args.json and not args.silent:
        run = outcome.run
        display.table(f"{args.output.name}: what the student learnt", ("", "measured"), [
            ("parameters", display.count(shape.parameters)),
            ("steps", str(len(run.losses))),
            ("tokens", display.count(run.tokens)),
            ("time", f"{run.seconds:.0f} s"),
            ("held-out cross-entropy: teacher", f"{outcome.teacher:.4f} nats a token"),
            ("student, before", f"{outcome.before:.4f}"),
            ("student, after", f"{outcome.after:.4f}"),
        ])
    return record


@contextmanager
def _private(args: Namespace) -> Iterator[Space | None]:
    """Where the teacher's draws are sealed, if they are to be."""
    if not args.private:
        yield None
        return
    if args.draws is None:
        raise SettingError("Only recorded draws need sealing; add --draws, or leave --private out.")
    from cloister.commands.vault import asking
    from cloister.settings import Settings
    from cloister.vault.local import open_vault

    with open_vault(Settings.from_environment(), asking(), create=True) as vault:
        yield vault.namespace(args.namespace)


def quantize_aware(args: Namespace) -> Record:
    """Quantize a checkpoint after training it to bear that."""
    with display.quiet(args.debug) as console:
        _lead(args, console)
        return _quantize_aware(args, console)


def _quantize_aware(args: Namespace, console: Console) -> Record:
    from cloister import training
    from cloister.model.checkpoint import Checkpoint
    from cloister.model.recipe import Recipe

    if args.data is None:
        raise SettingError("Training needs data; name some with --data, or leave --qat out.")
    source = Checkpoint.open(args.source)
    examples, _ = _examples(args, console)
    data = training.encode(source, examples, source.metadata.config.shape.context)
    run = training.train_quantized(
        source, args.output, recipe=Recipe.parse(args.recipe), data=data,
        schedule=_schedule(args, data, source.metadata.config.shape.context),
        folder=training.run_folder(args.output), compiled=args.compile,
        replace_existing=args.force, console=console,
    )
    if not args.json and not args.silent:
        display.table(f"{args.output.name}: trained to bear {args.recipe}", ("", "measured"), [
            ("steps", str(len(run.losses))), ("time", f"{run.seconds:.0f} s"),
            ("divergence, first step", f"{run.losses[0]:.2g} nats a token"),
            ("divergence, last step", f"{run.losses[-1]:.2g}"),
        ])
    return {
        "recipe": args.recipe, "identity": Checkpoint.open(args.output).identity,
        "steps": len(run.losses), "seconds": round(run.seconds, 1), "loss": run.losses[-1],
    }


def _lead(args: Namespace, console: Console) -> None:
    """Of several processes only the first gives word."""
    from cloister.distill.parallel import Parallel

    args.silent = console.quiet = Parallel().rank > 0


def _examples(args: Namespace, console: Console) -> tuple[list[Example], list[Example]]:
    """Training and held-out data, and word of what had to be left out."""
    from cloister.corpus import load, read, refuse_overlap, split

    corpus = load(args.data, tolerated=args.tolerate)
    if corpus.flaws:
        counts = ", ".join(f"{count} {kind}" for kind, count in corpus.count().items())
        places = ", ".join(map(str, corpus.flaws[:5]))
        console.print(f"Left out of {args.data.name}: {counts} (first {places}).", markup=False)
    examples: list[Example] = list(corpus.examples)
    if args.held_out is None:
        examples, held_out = split(examples)
    else:
        held_out = read(args.held_out)
        if not args.allow_overlap:
            refuse_overlap(examples, held_out)
    if not examples or not held_out:
        raise SettingError(
            f"{args.data.name} has too few examples to hold some out; add data, or name other "
            "examples with --held-out."
        )
    return examples, held_out


def _keep(args: Namespace, held_out: list[Example], console: Console) -> None:
    """What was held out of the data stays beside the run, for later measuring."""
    from cloister.distill.state import writing
    from cloister.training import run_folder

    path = run_folder(args.output) / "held-out.jsonl"
    with writing(path):
        path.write_text("".join(
            json.dumps({"task": each.task, "input": each.input, "target": each.target}) + "\n"
            for each in held_out), "utf-8")
    console.print(
        f"{len(held_out):,} examples were held out: {path.parent.name}/{path.name}.", markup=False)


def _schedule(args: Namespace, data: list[Pair], context: int) -> Schedule:
    from cloister.distill.data import one_pass
    from cloister.distill.schedule import Schedule

    plain = Schedule(
        steps=1, tokens=args.tokens, micro=min(args.tokens, args.micro), peak=args.rate,
        seed=args.seed, dropout=args.dropout, autocast=not args.float32,
    )
    steps = args.steps
    if steps is None:
        a_pass = len(one_pass(data, plain.micro, args.seed, context))
        steps = max(1, round(args.passes * a_pass / max(1, plain.tokens // plain.micro)))
    return replace(plain, steps=steps, warmup=min(plain.warmup, steps // 10))
