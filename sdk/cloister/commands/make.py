"""Commands that make something: a checkpoint, a bundle, the whole way."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cloister import display
from cloister.commands.teach import quantize_aware, showing
from cloister.errors import SettingError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from cloister.model.checkpoint import Checkpoint

__all__ = ["export", "export_bundle", "import_", "quantize", "show_receipt"]

Record = dict[str, Any]


def import_(args: Namespace) -> Record:
    """Read a Hugging Face directory into a checkpoint."""
    with display.quiet(args.debug) as console, console.status("importing"):
        from cloister.model.huggingface import import_huggingface

        checkpoint = import_huggingface(
            args.source, args.output, name=args.name, context=args.context, replace=args.force
        )
    shape = checkpoint.metadata.config.shape
    if not args.json:
        display.table("Imported", ("name", "parameters", "layers", "context", "vocabulary"), [(
            checkpoint.metadata.name, display.count(shape.parameters), str(shape.layers),
            str(shape.context), str(shape.vocab_size),
        )])
    return {
        "name": checkpoint.metadata.name, "parameters": shape.parameters,
        "shape": asdict(shape), "identity": checkpoint.identity,
    }


def quantize(args: Namespace) -> Record:
    """Quantize a checkpoint, and report every tensor."""
    if args.qat:
        return quantize_aware(args)
    with display.quiet(args.debug) as console, showing(console) as progress:
        from cloister.quantize.apply import quantize as apply

        report = apply(
            args.source, args.output, args.recipe, replace=args.force, progress=progress).report
    assert report is not None
    record: Record = report.to_dict()
    if not args.json:
        rows: dict[tuple[str, int, int | None], list[int]] = {}
        for row in record["tensors"]:
            kind = row["tensor"].split(".", 2)[-1] if row["tensor"].startswith("layers") else (
                row["tensor"])
            entry = rows.setdefault((kind, row["bits"], row["group"]), [0, 0, 0])
            entry[0] += 1
            entry[1] += math.prod(row["shape"])
            entry[2] += row["size_bytes"]
        display.table(
            f"{args.recipe}: {record['bits_per_parameter']:.2f} bits a parameter, "
            f"{display.bytes_text(record['size_bytes'])}",
            ("tensor", "of them", "bits", "group", "entries", "size"),
            [(
                kind, str(number), str(bits), str(group or "row" if bits < 32 else "-"),
                display.count(entries), display.bytes_text(size),
            ) for (kind, bits, group), (number, entries, size) in rows.items()],
        )
    return record


def export(args: Namespace) -> Record:
    """Make a bundle."""
    with display.quiet(args.debug) as console:
        from cloister.model.checkpoint import Checkpoint

        record = export_bundle(
            Checkpoint.open(args.source), args.output, console, backend=args.backend,
            chunk=args.chunk, random_weights=args.random_weights, replace=args.force,
            gate=_gate(args),
        )
    if not args.json:
        show_receipt(record)
    return record


def export_bundle(
    source: Checkpoint, out: Path, console: Console, **options: Any
) -> Record:
    """Export with a bar over its stages."""
    from cloister import pipeline

    with display.stages(console, "export", len(pipeline.STAGES)) as progress:
        bundle, divergence = pipeline.export(source, out, progress=progress, **options)
    manifest = bundle.manifest
    return {
        "bundle": bundle.path.name, "model_id": bundle.model_id(manifest.programs[0]),
        "size_bytes": sum(entry.size for entry in manifest.files.values()),
        "program_against_checkpoint": divergence.to_dict(),
    }


def _gate(args: Namespace) -> Callable[[Path], None]:
    """What refuses a bundle that is worse than asked for."""
    if args.gate is None:
        if args.gate_data or args.gate_against:
            raise SettingError("A gate needs bounds; name them with --gate.")
        return lambda directory: None
    if args.gate_data is None:
        raise SettingError("A gate needs data to measure on; name some with --gate-data.")
    from cloister.corpus import read
    from cloister.evaluate import gate
    from cloister.evaluate.report import evaluate
    from cloister.evaluate.subject import BundleSubject, open_subject

    bounds, examples = gate.parse(args.gate), read(args.gate_data)
    for bound in bounds:  # not only after the export, which may take minutes
        if bound.between_two and args.gate_against is None:
            raise SettingError(
                f"{bound.metric} compares two models; name the other with --gate-against."
            )
    against = open_subject(args.gate_against) if args.gate_against else None

    def measure(directory: Path) -> None:
        subject = BundleSubject(directory)
        subject.name = args.output.name  # the directory has a name of its own until it is accepted
        report = evaluate(subject, examples, against=against)
        gate.check(bounds, report.metrics)

    return measure


def show_receipt(record: Record) -> None:
    """Print what a program lost against its checkpoint."""
    lost = record["program_against_checkpoint"]
    display.table(f"{record['bundle']}: the program against its checkpoint", ("", "measured"), [
        ("tokens", f"{lost['n']}"),
        ("mean KL divergence", f"{lost['mean_kld']:.2g} nats"),
        ("99 % of tokens under", f"{lost['p99_kld']:.2g} nats"),
        ("same most likely token", f"{lost['top1']:.2%}"),
        ("relative error of the logits", f"{lost['relative_error']:.2%}"),
        ("bundle", display.bytes_text(record["size_bytes"])),
    ])
