"""The commands that make checkpoints and bundles: import, quantize, export."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import display
from cloister.commands import teach
from cloister.commands.options import Options, Record, check_data, checkpoint
from cloister.errors import SettingError
from cloister.files import check_output
from cloister.model import installed
from cloister.settings import model_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from cloister.bundle import Bundle

__all__ = [
    "Export", "Import", "Quantize", "export", "exported", "import_", "quantize", "show_receipt",
]


@dataclass(frozen=True, kw_only=True)
class Import(Options):
    """The options of `cloister import`."""

    source: Path | None
    output: Path | None
    list: bool
    name: str | None
    context: int | None
    ignore: Sequence[str]
    force: bool


@dataclass(frozen=True, kw_only=True)
class Quantize(teach.TrainOptions):
    """The options of `cloister quantize`."""

    source: Path
    recipe: str
    qat: bool
    calibrate: str | None  # "self", or a path


@dataclass(frozen=True, kw_only=True)
class Export(Options):
    """The options of `cloister export`."""

    source: Path
    output: Path
    backend: str
    chunk: int
    gate: str | None
    gate_data: Path | None
    gate_against: Path | None
    force: bool


def import_(args: Import) -> Record:
    """Read a model that others made into a checkpoint, or list those that this machine has."""
    if args.list:
        return _list(args)
    assert args.source is not None and args.output is not None
    source, name = args.source, args.name
    if not source.exists():
        found = installed.named(str(source), model_folders())
        source, name = found.path, name or found.title
    check_output(args.output, kind="checkpoint", replace=args.force)
    with display.quiet(args.debug) as console, display.progress(console, "import") as progress:
        from cloister.model.imports import import_model

        imported = import_model(
            source, args.output, name=name, context=args.context, ignore=args.ignore,
            replace=args.force, progress=progress)
    shape, origin = imported.metadata.config.shape, imported.metadata.origin
    assert origin is not None
    if not args.json:
        display.table("Imported", ("name", "parameters", "layers", "context", "vocabulary"), [(
            imported.metadata.name, display.count(shape.parameters), str(shape.layers),
            str(shape.context), str(shape.vocab_size),
        )])
        display.show("Stored as: " + ", ".join(
            f"{kind} ({number} tensors)" for kind, number in sorted(origin.types.items())))
        for what, names in (("Passed over", origin.passed_over), ("Ignored", origin.ignored)):
            if names:
                display.show(f"{what}: {', '.join(names)}")
        if imported.template_path is None:
            display.show("It has no chat template: a conversation becomes lines of ROLE: TEXT.")
    return {
        "name": imported.metadata.name, "parameters": shape.parameters,
        "shape": asdict(shape), "identity": imported.identity, "source": origin.to_dict(),
    }


def _list(args: Import) -> Record:
    folders = model_folders()
    with display.quiet(args.debug) as console, display.progress(console, "list") as progress:
        models = installed.find(folders)
        problems = []
        for done, model in enumerate(models):
            progress("headers", done, len(models))
            problems.append(installed.problem(model))
    searched = [str(folder) for folder in folders.values()]
    if not args.json:
        if models:
            display.table("Models that other programs keep here", (
                "name", "kind", "can be imported", "path", "size"), [(
                    model.name, f"{model.program}, {model.format}",
                    "yes" if problem is None else f"no: {problem}", str(model.path),
                    display.bytes_text(model.size_bytes),
                ) for model, problem in zip(models, problems, strict=True)], texts=4)
        display.show(f"{len(models)} models in {', '.join(searched)}")
    return {
        "models": [{
            "name": model.name, "program": model.program, "format": model.format,
            "size_bytes": model.size_bytes, "path": str(model.path), "problem": problem,
        } for model, problem in zip(models, problems, strict=True)],
        "searched": searched,
    }


def quantize(args: Quantize) -> Record | None:
    """Quantize a checkpoint, trained for it first or not, and report every tensor."""
    source = checkpoint(args.source)
    check_output(args.output, kind="checkpoint", replace=args.force)
    if args.calibrate not in (None, "self"):
        check_data(Path(args.calibrate))
    if args.qat and args.calibrate is not None:
        raise SettingError("What is trained for its rounding is not calibrated; leave one out.")
    if args.qat:
        return teach.quantize_aware(args, source, args.recipe)
    with display.quiet(args.debug) as console, display.progress(console, "quantize") as progress:
        from cloister.quantize.apply import quantize as apply

        report = apply(
            source, args.output, args.recipe, calibrate=args.calibrate, replace=args.force,
            progress=progress).report
    assert report is not None
    record = dict(report.to_dict())
    if not args.json:
        _show_tensors(args.recipe, record)
    return record


def _show_tensors(recipe: str, record: dict[str, Any]) -> None:
    rows: dict[tuple[str, int, int | None], list[int]] = {}
    for row in record["tensors"]:
        name = row["tensor"]
        kind = name.split(".", 2)[-1] if name.startswith("layers") else name
        entry = rows.setdefault((kind, row["bits"], row["group"]), [0, 0, 0])
        entry[0] += 1
        entry[1] += math.prod(row["shape"])
        entry[2] += row["size_bytes"]
    display.table(
        f"{recipe}: {record['bits_per_parameter']:.2f} bits a parameter, "
        f"{display.bytes_text(record['size_bytes'])}",
        ("tensor", "of them", "bits", "group", "entries", "size"),
        [(
            kind, str(number), str(bits), str(group or "row" if bits < 32 else "-"),
            display.count(entries), display.bytes_text(size),
        ) for (kind, bits, group), (number, entries, size) in rows.items()],
    )


def export(args: Export) -> Record:
    """Make a bundle."""
    source = checkpoint(args.source)
    check_output(args.output, kind="bundle", replace=args.force)
    with display.quiet(args.debug) as console:
        gate = _gate(args, console)
        with display.progress(console, "export") as progress:
            from cloister import pipeline

            record = exported(pipeline.export(
                source, args.output, backend=args.backend, chunk=args.chunk, gate=gate,
                replace=args.force, progress=progress))
    if not args.json:
        show_receipt(record)
    return record


def exported(bundle: Bundle) -> Record:
    """Return what `--json` prints of a new bundle."""
    assert bundle.report is not None
    manifest = bundle.manifest
    return {
        "bundle": bundle.path.name, "model_id": bundle.model_id(manifest.programs[0]),
        "size_bytes": sum(entry.size for entry in manifest.files.values()),
        **bundle.report.to_dict(),
        "phone_tokenizer": bundle.receipt()["phone_tokenizer"],
    }


def _gate(args: Export, console: Console) -> Callable[[Path], None] | None:
    """Return a check that raises GateFailed for a bundle outside the bounds, if any are asked."""
    if args.gate is None:
        if args.gate_data or args.gate_against:
            raise SettingError("A gate needs bounds; name them with --gate.")
        return None
    if args.gate_data is None:
        raise SettingError("A gate needs data to measure on; name some with --gate-data.")
    check_data(args.gate_data)
    from cloister.corpus import MEASURE, read, select
    from cloister.evaluate import gate
    from cloister.evaluate.report import evaluate
    from cloister.evaluate.subject import BundleSubject, open_subject

    bounds, selection = gate.parse(args.gate), select(args.gate_data, MEASURE)
    console.print(f"To measure on: {selection}", markup=False, highlight=False)
    examples = read(selection)
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
    """Print what a program lost against its checkpoint, and both against their parent."""
    lost, proved = record["program_against_checkpoint"], record["parts_against_checkpoint"]
    rows = [
        ("parts compared", f"{proved['parts']}"),
        ("the worst is off by", f"{proved['worst']['size']:.1g} of what it gives"),
        ("tokens", f"{lost['n']}"),
        ("mean KL divergence", f"{lost['mean_kld']:.2g} nats"),
        ("99 % of tokens under", f"{lost['p99_kld']:.2g} nats"),
        ("same most likely token", f"{lost['top1']:.2%}"),
        ("relative error of the logits", f"{lost['relative_error']:.2%}"),
    ]
    if "reason" not in (parent := record["against_parent"]):
        program, eager = parent["program"], parent["checkpoint"]
        rows += [
            ("divergence from the unquantized model", f"{program['mean_kld']:.2g} nats"),
            ("... of the checkpoint", f"{eager['mean_kld']:.2g} nats"),
            ("same most likely token as it", f"{program['top1']:.2%}"),
            ("... of the checkpoint", f"{eager['top1']:.2%}"),
        ]
    rows.append(("bundle", display.bytes_text(record["size_bytes"])))
    display.table(f"{record['bundle']}: the program against its checkpoint", ("", "measured"), rows)
    if reason := record["phone_tokenizer"]["reason"]:
        display.show(f"Not for ExecuTorch's runners on phones as it is: {reason}.")
