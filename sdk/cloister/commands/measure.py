"""The commands that measure: tiers, verify, bench, eval."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cloister import display, reference
from cloister.backend import CLOISTER
from cloister.commands import bench_tables
from cloister.commands.options import Options, Record, check_data
from cloister.errors import SettingError
from cloister.runtime.memory import PROCESS_BYTES, available_bytes
from cloister.tiers import DEVICES, Scale, Tier, ladder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from cloister.corpus import Example, Split

__all__ = ["Bench", "Eval", "Tiers", "Verify", "bench", "eval_", "tiers", "verify"]


@dataclass(frozen=True, kw_only=True)
class Tiers(Options):
    """The options of `cloister tiers`."""

    size: Scale
    context: int | None


@dataclass(frozen=True, kw_only=True)
class Verify(Options):
    """The options of `cloister verify`."""

    bundle: str


@dataclass(frozen=True, kw_only=True)
class Bench(Options):
    """The options of `cloister bench`."""

    shape: Tier | None
    bundle: Path | None
    random: bool
    device_class: bool
    instructions: Path | None
    record: bool
    size: Scale
    recipe: str
    backend: str
    kv: str | None
    against: str | None
    peer_python: str
    turns: int
    keep: Path | None
    profile: bool


@dataclass(frozen=True, kw_only=True)
class Eval(Options):
    """The options of `cloister eval`."""

    models: list[str]
    data: Path
    split: Split | None
    task: str | None
    limit: int | None
    against: str | None
    record: bool
    picture: Path | None
    family: Path | None


def tiers(args: Tiers) -> Record:
    """Print the ladder."""
    here = available_bytes()
    rows: list[Record] = []
    for tier, shape in ladder(args.size).shapes.items():
        context = shape.context if args.context is None else args.context
        if context < 1:
            raise SettingError(f"context is {context}; it must be at least 1.")
        kv = shape.kv_bytes_per_token()
        need = shape.weight_bytes() + context * kv + PROCESS_BYTES
        rows.append({
            "tier": str(tier), "parameters": shape.parameters,
            "four_bit_bytes": shape.weight_bytes(), "kv_bytes_per_token": kv,
            "context": context, "memory_bytes": need, "fits_this_machine": need <= here,
            "fits": [name for name, budget in DEVICES.items() if need <= budget],
        })
    if not args.json:
        display.table(
            f"The {args.size} ladder; {display.bytes_text(here)} are available here",
            ("tier", "parameters", "4-bit size", "KV a token", "context", "memory", "fits here",
             "fits an app on"),
            [(
                row["tier"], display.count(row["parameters"]),
                display.bytes_text(row["four_bit_bytes"]),
                display.bytes_text(row["kv_bytes_per_token"]), str(row["context"]),
                display.bytes_text(row["memory_bytes"]),
                "yes" if row["fits_this_machine"] else "no",
                f"{row['fits'][0]} and up" if row["fits"] else "a server",
            ) for row in rows],
        )
    return {"size": str(args.size), "available_bytes": here, "tiers": rows}


def verify(args: Verify) -> Record:
    """Verify a bundle."""
    from cloister.bundle import Bundle
    from cloister.settings import Settings

    Bundle.open(args.bundle)  # before anything heavy is imported
    with display.quiet(args.debug) as console, console.status("verifying"):
        from cloister import pipeline

        result = pipeline.verify(args.bundle, Settings.from_environment())
    if not args.json:
        checks = result["checks"]
        display.table(f"{Path(args.bundle).name} is what it claims to be", ("check", "passed"), [
            ("files with the right sha256", str(checks["files"])),
            ("golden prompts answered alike", str(checks["golden_prompts"])),
            ("golden tokens", str(checks["golden_tokens"])),
            *([("the same with XNNPACK's weights cache on, as on phones", "yes")]
              if checks["as_on_phones"] else []),
            *((f"program for {name}", said) for name, said in checks["programs"].items()),
            ("model id", str(result["model_id"])[:16] + "..."),
        ])
    return {"ok": True, **result}


def bench(args: Bench) -> Record:
    """Measure speed and memory."""
    if args.shape is not None and not args.random:
        raise SettingError("--shape has random weights only; add --random to say so.")
    if args.device_class:
        return _device_classes(args)
    if args.record or args.instructions is not None:
        raise SettingError("Only what --device-class finds is recorded; add it.")
    if args.against is not None:
        return _against(args, args.against)
    if args.profile:
        return _profile(args)
    with display.quiet(args.debug) as console:
        from cloister import bench as benching

        record = _measured(args, console, "bench", benching.measure, partial(
            benching.shape, backend=args.backend))
    if not args.json:
        display.table("Bench", ("what", "measured"), [
            (name, f"{value:,.2f}" if isinstance(value, float) else f"{value}")
            for name, value in _flat(record)
        ])
    return record


def _measured(
    args: Bench, console: Console, what: str, of_bundle: Callable[..., Record],
    of_shape: Callable[..., Record]
) -> Record:
    """Return what is measured of the bundle or the shape that the command line names."""
    if args.bundle is not None:
        return {"bundle": args.bundle.name, **of_bundle(args.bundle, debug=args.debug)}
    with display.progress(console, f"{what} {args.shape}") as progress:
        return of_shape(
            args.shape, args.size, args.recipe, progress, kv=args.kv, debug=args.debug)


def _against(args: Bench, peers: str) -> Record:
    """Measure a shape beside other runtimes."""
    if args.shape is None or args.profile:
        raise SettingError("--against takes --shape and --random, and no --profile.")
    with display.quiet(args.debug) as console:
        from cloister.bench import against

        names = against.check_names(peers)
        with display.progress(console, f"bench {args.shape}") as progress:
            record = against.compare(
                against.Model(
                    tier=args.shape, scale=args.size, recipe=args.recipe, kv=args.kv),
                names, python=args.peer_python, turns=args.turns, keep=args.keep,
                progress=progress, debug=args.debug)
    record = {
        "command": f"cloister bench --shape {args.shape} --size {args.size} --random --recipe "
                   f"{args.recipe} --against {','.join(names)} --turns {args.turns}"
                   + (f" --kv {args.kv}" if args.kv else ""),
        "date": f"{datetime.now(UTC):%Y-%m-%d}", **record}
    for name, said in record["left_out"].items():
        display.note(f"Left out: {name}: {said}")
    if not args.json:
        for table in bench_tables.against(record):
            display.table(*table)
    return record


def _profile(args: Bench) -> Record:
    """Measure the time of each operator."""
    if args.shape is not None and args.backend != CLOISTER.name:
        raise SettingError(
            f"--profile is of Cloister's own operators; add --backend {CLOISTER.name}.")
    with display.quiet(args.debug) as console:
        from cloister import bench as benching

        record = _measured(args, console, "profile", benching.profile, benching.profile_shape)
    if not args.json:
        display.table(*bench_tables.profile(record))
    return record


def _device_classes(args: Bench) -> Record:
    """Measure a bundle under what an app may take on phones."""
    if args.bundle is None:
        raise SettingError("--device-class takes a bundle; name one with --bundle.")
    from cloister import device_class
    from cloister.bundle import Bundle
    from cloister.settings import Settings

    bundle = Bundle.open(args.bundle)
    counted = None if args.instructions is None else device_class.instructions(
        bundle, args.instructions)
    with display.quiet(args.debug) as console, console.status("starting under limits"):
        record = device_class.measure(bundle, Settings.from_environment(), debug=args.debug)
    if counted is not None:
        record["instructions_per_token"] = counted
    if args.record:
        device_class.write(bundle, record)
    if not args.json:
        display.table(
            f"{args.bundle.name} in {record['process']} on {record['measured_on']}",
            ("device", "an app may take", "loads", "peak", "cold start here", "faults a token"),
            [device_class.cells(row) for row in record["classes"]])
        for name, processor in (counted or {}).get("processors", {}).items():
            display.show(f"{name}, emulated: {processor['mean']:,.0f} instructions a token, "
                         f"repeats {processor['spread']:.1e} apart")
    return {"bundle": args.bundle.name, **record}


def eval_(args: Eval) -> Record:
    """Measure scores, and divergence from another model."""
    check_data(args.data)
    paths = [reference.find(name, args.family) for name in args.models]
    names = _names(args.models)
    from cloister.evaluate import scoreboard

    if args.picture is not None:
        scoreboard.check_picture(args.picture)
    if args.record and not all((path / "manifest.json").exists() for path in paths):
        raise SettingError("Only a bundle has a receipt to record in; leave --record out.")
    examples, part, data = _examples(args)
    reports = _reports(args, dict(zip(names, paths, strict=True)), examples, part, data)
    metrics = {report["model"]: report["metrics"] for report in reports}
    base = next((name for name in metrics if Path(name).stem == Tier.PRO), next(iter(metrics)))
    if args.picture is not None:
        scoreboard.write_picture(args.picture, metrics, base)
    divided = scoreboard.ratios(metrics, base)
    if not args.json:
        _show_scores(reports, divided, base)
    if len(reports) == 1:
        return reports[0]
    return {**data, "n": len(examples), "reports": reports, "base": base,
            "divided": divided}


def _examples(args: Eval) -> tuple[list[Example], str, Record]:
    """Return the examples, the part of the data that they are, if not all, and what was read."""
    from cloister.corpus import MEASURE, read, select

    selection = select(args.data, MEASURE, args.split)
    display.note(f"To measure on: {selection}")
    whole = read(selection)
    if args.task is not None:
        whole = [example for example in whole if example.task == args.task]
    # Evenly over the whole, not the first: files are sorted by intent.
    step = 1 if args.limit is None else max(1, -(-len(whole) // args.limit))
    examples = whole[::step]
    limited = f"{len(examples)} of {len(whole)}" if step > 1 else None
    data = {"data": args.data.resolve().name, **selection.to_dict()}
    return examples, ", ".join(filter(None, (args.split, args.task, limited))), data


def _reports(
    args: Eval, models: dict[str, Path], examples: list[Example], part: str, data: Record
) -> list[Record]:
    """Evaluate each model, and record the result in its receipt where that is asked for."""
    reports: list[Record] = []
    with display.quiet(args.debug) as console:
        from cloister.evaluate.report import evaluate
        from cloister.evaluate.subject import open_subject

        other = args.against and open_subject(reference.find(args.against, args.family))
        for name, path in models.items():
            with display.progress(console, f"eval {name}") as progress:
                report = evaluate(
                    open_subject(path), examples, against=other or None, progress=progress)
            reports.append({**report.to_dict(), "model": name, **data})
            if args.record:
                _record(path, reports[-1], part)
    return reports


def _names(models: list[str]) -> list[str]:
    """Return a name for each model: its directory, with the one around it where two are alike.

    Raises:
        SettingError: that does not tell them apart.
    """
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        full = [Path(model).resolve() for model in models]
        names = [f"{path.parent.name}/{path.name}" for path in full]
    if len(set(names)) < len(names):
        raise SettingError("Two of the models have one name; evaluate them one at a time.")
    return names


def _record(path: Path, record: Record, part: str) -> None:
    """Add `record` to the bundle's receipt; a part of the data never replaces the whole."""
    from cloister.bundle import Bundle, rewrite_receipt

    bundle = Bundle.open(path)
    receipt = bundle.receipt()
    recorded = receipt.get("evaluations")
    evaluations = dict(recorded) if isinstance(recorded, dict) else {}
    key = ", ".join(filter(None, (record["data"], part)))
    key += f" against {record['against']}" if "against" in record else ""
    evaluations[key] = {name: record[name] for name in ("n", "metrics", "errors")}
    rewrite_receipt(bundle, {**receipt, "evaluations": evaluations})


def _show_scores(reports: list[Record], divided: dict[str, dict[str, float]], base: str) -> None:
    names = list(dict.fromkeys(name for report in reports for name in report["metrics"]))

    def cell(report: Record, name: str) -> str:
        if name not in report["metrics"]:
            return "-"
        error = report["errors"].get(name)
        text = f"{report['metrics'][name]:.4g}" + (f" \u00b1 {error:.2g}" if error else "")
        if len(reports) > 1 and report["model"] != base and name in divided[report["model"]]:
            text += f"  ({divided[report['model']][name]:.2f})"
        return text

    title = f"{reports[0]['n']} examples of {reports[0]['data']}, with standard errors"
    if len(reports) > 1:
        title += f"; in brackets divided by {base}"
    display.table(title, ("score", *(report["model"] for report in reports)), [
        (name, *(cell(report, name) for report in reports)) for name in names
    ])


def _flat(record: Record, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value
