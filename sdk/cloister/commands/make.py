"""The commands that begin and end the way: import and export."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cloister import display
from cloister.commands.options import Options, Record, check_data, checkpoint
from cloister.errors import SettingError
from cloister.files import check_output
from cloister.model import installed
from cloister.settings import model_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from cloister.bundle import Bundle
    from cloister.corpus import Split

__all__ = ["Export", "Import", "export", "exported", "find_source", "import_", "show_receipt"]


@dataclass(frozen=True, kw_only=True)
class Import(Options):
    """The options of `cloister import`."""

    source: Path | None
    output: Path | None
    list: bool
    name: str | None
    context: int | None
    ignore: Sequence[str]
    keep_quantization: bool
    force: bool


@dataclass(frozen=True, kw_only=True)
class Export(Options):
    """The options of `cloister export`."""

    source: Path
    output: Path
    backend: str
    also: Sequence[str]
    kv: str | None
    recipe: str | None
    chunk: int
    gate: str | None
    gate_data: Path | None
    gate_against: Path | None
    split: Split | None
    force: bool


_READS = {"vision": "pictures", "audio": "recordings"}


def import_(args: Import) -> Record:
    """Read a model that others made into a checkpoint, or list those that this machine has."""
    if args.list:
        return _list(args)
    assert args.source is not None and args.output is not None
    if args.output.suffix == ".safetensors":
        return _import_encoder(args, args.source, args.output)
    source, title = find_source(args.source)
    name = args.name or title
    check_output(args.output, kind="checkpoint", replace=args.force)
    with display.quiet(args.debug) as console, display.progress(console, "import") as progress:
        from cloister.model.imports import import_model

        imported = import_model(
            source, args.output, name=name, context=args.context, ignore=args.ignore,
            keep_quantization=args.keep_quantization, replace=args.force, progress=progress)
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
        for kind, file in imported.senses.items():
            what, encoder = _READS[kind], file.config.encoder
            display.show(
                f"Reads {what}: {encoder.layers} layers of {encoder.hidden_size}, "
                f"{file.config.vectors} vectors.")
        if imported.template_path is None:
            display.show("It has no chat template: a conversation becomes lines of ROLE: TEXT.")
    return {
        "name": imported.metadata.name, "parameters": shape.parameters,
        "shape": asdict(shape), "identity": imported.identity, "source": origin.to_dict(),
        "recipe": imported.metadata.recipe,
        "senses": {kind: asdict(file.config.encoder) for kind, file in imported.senses.items()},
    }


def _import_encoder(args: Import, source: Path, output: Path) -> Record:
    """Read the encoder of a Whisper model into one file."""
    if args.name or args.context or args.ignore or args.keep_quantization:
        raise SettingError(
            "An encoder has no --name, --context, --ignore or --keep-quantization; leave them "
            "out.")
    with display.quiet(args.debug) as console, display.progress(console, "import") as progress:
        from cloister.model.encoder_import import import_encoder

        imported = import_encoder(source, output, replace=args.force, progress=progress)
    shape = imported.config.encoder
    if not args.json:
        display.table("Imported", ("encoder", "layers", "hidden size", "positions"), [(
            output.name, str(shape.layers), str(shape.hidden_size), str(shape.positions))])
    return {
        "name": output.stem, "encoder": asdict(shape), "identity": imported.identity,
    }


def find_source(source: Path) -> tuple[Path, str | None]:
    """Return where a model is, and its title where `source` is a name out of `import --list`.

    Raises:
        SettingError: there is neither a path nor one model of that name.
    """
    if source.exists():
        return source, None
    found = installed.named(str(source), model_folders())
    return found.path, found.title


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


def export(args: Export) -> Record:
    """Make a bundle."""
    source = checkpoint(args.source)
    check_output(args.output, kind="bundle", replace=args.force)
    with display.quiet(args.debug) as console:
        gate = _gate(args, console)
        with ExitStack() as stack:
            progress = stack.enter_context(display.progress(console, "export"))
            from cloister import pipeline

            quantized = source if args.recipe is None else stack.enter_context(
                pipeline.quantized(source, args.output, args.recipe, progress))
            record = exported(pipeline.export(
                quantized, args.output, backends=(args.backend, *args.also), kv=args.kv,
                chunk=args.chunk, gate=gate, replace=args.force, progress=progress))
    if not args.json:
        show_receipt(record)
    return record


def exported(bundle: Bundle) -> Record:
    """Return what `--json` prints of a new bundle."""
    assert bundle.report is not None
    manifest = bundle.manifest
    return {
        "bundle": bundle.path.name, "model_id": bundle.model_id(manifest.programs[0]),
        "size_bytes": manifest.size_bytes,
        **bundle.report.to_dict(),
        "further_programs": bundle.receipt()["further_programs"],
        "phone_tokenizer": bundle.receipt()["phone_tokenizer"],
    }


def _gate(args: Export, console: Console) -> Callable[[Path], None] | None:
    """Return a check that raises GateFailed for a bundle outside the bounds, if any are asked."""
    if args.gate is None:
        if args.gate_data or args.gate_against or args.split:
            raise SettingError("A gate needs bounds; name them with --gate.")
        return None
    if args.gate_data is None:
        raise SettingError("A gate needs data to measure on; name some with --gate-data.")
    check_data(args.gate_data)
    from cloister.corpus import MEASURE, read, select
    from cloister.evaluate import gate
    from cloister.evaluate.report import evaluate
    from cloister.evaluate.subject import BundleSubject, open_subject

    bounds, selection = gate.parse(args.gate), select(args.gate_data, MEASURE, args.split)
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
    for each in record["further_programs"]:
        rows.append((f"program for {each['backend']}", (
            f"{each['note']}; its graph {each['graph_against_checkpoint']['mean_kld']:.2g} nats"
            if "note" in each else
            f"{each['program_against_checkpoint']['mean_kld']:.2g} nats from the checkpoint")))
    rows.append(("bundle", display.bytes_text(record["size_bytes"])))
    display.table(f"{record['bundle']}: the program against its checkpoint", ("", "measured"), rows)
    if reason := record["phone_tokenizer"]["reason"]:
        display.show(f"Not for ExecuTorch's runners on phones as it is: {reason}.")
