"""What each command does. Each takes parsed arguments, shows people a result unless `--json` is
given, and gives the record that `--json` prints."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import display, reference
from cloister.errors import CloisterError, SettingError
from cloister.runtime.client import Worker
from cloister.runtime.memory import PROCESS_BYTES, available_bytes
from cloister.tiers import Scale, Tier, ladder

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from rich.console import Console

    from cloister.model.checkpoint import Checkpoint

__all__ = [
    "bench", "chat", "compare", "demo", "export", "import_", "quantize", "replay", "run", "tiers",
    "verify",
]

Record = dict[str, Any]

_GIB = 2**30
# What a foreground app may take on a common device: about half of a phone's memory.
_DEVICES = (
    ("phone 4 GB", 2 * _GIB), ("phone 8 GB", 4 * _GIB), ("phone 12 GB", 6 * _GIB),
    ("laptop 16 GB", 12 * _GIB), ("desktop 64 GB", 56 * _GIB),
)


def tiers(args: Namespace) -> Record:
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
            "fits": [name for name, budget in _DEVICES if need <= budget],
        })
    if not args.json:
        display.table(
            f"The {args.size} ladder; {display.bytes_text(here)} are available here",
            ("tier", "parameters", "4-bit size", "KV a token", "context", "memory", "fits here",
             "fits an app on"),
            [(
                row["tier"], _count(row["parameters"]), display.bytes_text(row["four_bit_bytes"]),
                display.bytes_text(row["kv_bytes_per_token"]), str(row["context"]),
                display.bytes_text(row["memory_bytes"]),
                "yes" if row["fits_this_machine"] else "no",
                f"{row['fits'][0]} and up" if row["fits"] else "a server",
            ) for row in rows],
        )
    return {"size": str(args.size), "available_bytes": here, "tiers": rows}


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
            checkpoint.metadata.name, _count(shape.parameters), str(shape.layers),
            str(shape.context), str(shape.vocab_size),
        )])
    return {
        "name": checkpoint.metadata.name, "parameters": shape.parameters,
        "shape": asdict(shape), "identity": checkpoint.identity,
    }


def quantize(args: Namespace) -> Record:
    """Quantize a checkpoint, and report every tensor."""
    with display.quiet(args.debug) as console:
        record = _quantize(args.source, args.output, args.recipe, console, replace=args.force)
    if not args.json:
        rows: dict[tuple[str, int, int | None], list[int]] = {}
        for row in record["tensors"]:
            kind = row["tensor"].split(".", 2)[-1] if row["tensor"].startswith("layers") else (
                row["tensor"])
            entry = rows.setdefault((kind, row["bits"], row["group"]), [0, 0, 0])
            entry[0] += 1
            entry[1] += _entries(row["shape"])
            entry[2] += row["size_bytes"]
        display.table(
            f"{args.recipe}: {record['bits_per_parameter']:.2f} bits a parameter, "
            f"{display.bytes_text(record['size_bytes'])}",
            ("tensor", "of them", "bits", "group", "entries", "size"),
            [(
                kind, str(number), str(bits), str(group or "row" if bits < 32 else "-"),
                _count(entries), display.bytes_text(size),
            ) for (kind, bits, group), (number, entries, size) in rows.items()],
        )
    return record


def export(args: Namespace) -> Record:
    """Make a bundle."""
    with display.quiet(args.debug) as console:
        from cloister.model.checkpoint import Checkpoint

        record = _export(
            Checkpoint.open(args.source), args.output, console, backend=args.backend,
            chunk=args.chunk, random_weights=args.random_weights, replace=args.force,
        )
    if not args.json:
        _show_receipt(record)
    return record


def verify(args: Namespace) -> Record:
    """Prove a bundle."""
    with display.quiet(args.debug) as console, console.status("verifying"):
        from cloister import pipeline
        from cloister.settings import Settings

        result = pipeline.verify(args.bundle, Settings.from_environment())
    if not args.json:
        checks = result["checks"]
        display.table(f"{Path(args.bundle).name} is what it claims to be", ("check", "passed"), [
            ("files with the right sha256", str(checks["files"])),
            ("golden prompts answered alike", str(checks["golden_prompts"])),
            ("golden tokens", str(checks["golden_tokens"])),
            ("model id", str(result["model_id"])[:16] + "..."),
        ])
    return {"ok": True, **result}


def run(args: Namespace) -> Record:
    """One answer, streamed."""
    with Worker(debug=args.debug) as worker:
        loaded = worker.load(_bundle(args.bundle, args.family))
        text, ids, tokens = "", [], []
        for piece in worker.stream(args.prompt, top=args.logprobs, **_request(args)):
            text += piece.text
            ids.append(piece.id)
            if args.logprobs:
                tokens.append({"id": piece.id, "text": piece.text, "logprob": piece.logprob,
                               "top": [list(pair) for pair in piece.top]})
            if not args.json:
                print(piece.text, end="", flush=True)  # noqa: T201
        stats = worker.stats
    if not args.json:
        print()  # noqa: T201
        if args.logprobs:
            display.table("Tokens", ("text", "log-probability", "id"), [
                (repr(token["text"]), f"{token['logprob']:.3f}", str(token["id"]))
                for token in tokens
            ])
    if args.replay is not None:
        from cloister.runtime import replay
        from cloister.runtime.sampling import Sampling

        replay.write(
            args.replay, model_id=loaded["model_id"], system=args.system, prompt=args.prompt,
            max_tokens=args.max_tokens, sampling=Sampling(**_sampling(args)), tokens=ids,
        )
        _say(f"{args.replay.name} holds the prompt and the answer in plain text; keep it safe.")
    record = {
        "text": text, "tokens": stats["tokens"], "finish": stats["finish"],
        "ttft_s": stats["ttft_s"], "decode_tokens_per_s": stats["decode_tokens_per_s"],
        "peak_rss_bytes": stats["peak_rss_bytes"], "guard_tier": stats["guard_tier"],
        "prompt_tokens": stats["prompt_tokens"], "load_s": loaded["load_s"],
        "model_id": loaded["model_id"],
    }
    return {**record, "logprobs": tokens} if args.logprobs else record


def chat(args: Namespace) -> Record:
    """A conversation."""
    turns = 0
    with Worker(debug=args.debug) as worker:
        worker.load(_bundle(args.bundle, args.family))
        if not args.json:
            _say("Nothing is kept once you leave. /new begins again, an empty line leaves.")
        answers = []
        for prompt in _lines(prompts=not args.json):
            if prompt == "/new":
                worker.forget()
                continue
            text = ""
            try:
                for piece in worker.stream(prompt, **_request(args)):
                    text += piece.text
                    if not args.json:
                        print(piece.text, end="", flush=True)  # noqa: T201
            except KeyboardInterrupt:
                _say("(stopped)")
            except CloisterError as error:  # the conversation is as before
                _say(str(error))
                continue
            turns += 1
            answers.append(text)
            if not args.json:
                print()  # noqa: T201
    return {"turns": turns, "answers": answers}


def compare(args: Namespace) -> Record:
    """Tiers side by side."""
    if args.tiers:
        names = args.tiers.split(",")
    else:
        names = [t for t in Tier if reference.bundle_path(t, args.family).is_dir()]
        if not names:
            raise SettingError("The family has no bundle; name some with --tiers.")
    rows = [_answer(name, args) for name in names]
    if not args.json:
        _side_by_side(rows)
    return {"answers": rows}


def replay(args: Namespace) -> Record:
    """Run a replay file again."""
    with display.quiet(args.debug):
        from cloister.runtime.engine import Engine
        from cloister.runtime.replay import replay as again

        tokens = again(Engine(_bundle(args.bundle, args.family)), args.file)
    if not args.json:
        print(f"{tokens} tokens, all the same.")  # noqa: T201
    return {"ok": True, "tokens": tokens}


def bench(args: Namespace) -> Record:
    """Speed and memory."""
    with display.quiet(args.debug) as console:
        from cloister import bench as benching

        if args.bundle is not None:
            record = {"bundle": args.bundle.name, **benching.measure(args.bundle, debug=args.debug)}
        else:
            if not args.random:
                raise SettingError("--shape has random weights only; add --random to say so.")
            with display.stages(console, f"bench {args.shape}", benching.STAGES) as progress:
                record = benching.shape(
                    args.shape, args.size, args.recipe, progress, debug=args.debug
                )
    if not args.json:
        display.table("Bench", ("what", "measured"), [
            (name, f"{value:,.2f}" if isinstance(value, float) else f"{value}")
            for name, value in _flat(record)
        ])
    return record


def demo(args: Namespace) -> Record:
    """The whole way on the shipped family."""
    requests = [
        json.loads(line) for line in reference.requests_path().read_text("utf-8").splitlines()
    ]
    with tempfile.TemporaryDirectory() as scratch, display.quiet(args.debug) as console:
        from cloister.model.checkpoint import Checkpoint

        quantized = Path(scratch) / "nano-1-8da4w"
        out = args.output or Path(scratch) / "nano-1.cloister"
        console.print("[bold]1. Quantize[/] Nano-1 from the shipped checkpoint to 4 bits")
        sizes = _quantize(reference.checkpoint_path("nano-1"), quantized, "8da4w-g32", console)
        console.print(
            f"   {_count(sizes['parameters'])} weights, {sizes['bits_per_parameter']:.2f} bits "
            f"each, {display.bytes_text(sizes['size_bytes'])}; nothing skipped"
        )
        console.print("[bold]2. Export[/] it with ExecuTorch, and check the program")
        exported = _export(
            Checkpoint.open(quantized), out, console,
            golden=[(row["system"], row["prompt"]) for row in requests],
        )
        console.print("[bold]3. Run[/] it beside the shipped tiers, one at a time")
        bundles = {"nano-1, just made": out} | {
            str(tier): reference.bundle_path(tier) for tier in reversed(Tier)
            if reference.bundle_path(tier).is_dir()
        }
        answers = [
            _demo_answers(name, path, requests, args.debug) for name, path in bundles.items()
        ]
    if not args.json:
        _show_receipt(exported)
        _show_demo(requests, answers)
    return {"quantize": sizes, "export": exported, "tiers": answers}


def _demo_answers(name: str, path: Path, requests: list[Record], debug: bool) -> Record:
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


def _show_demo(requests: list[Record], answers: list[Record]) -> None:
    shown = 4
    for number, row in enumerate(requests[:shown]):
        display.table(
            f"{row['prompt']}", ("tier", "answer"),
            [(tier["tier"], tier["answers"][number]) for tier in answers], texts=2,
        )
    display.table(
        f"{len(requests)} requests, {min(shown, len(requests))} of them above",
        ("tier", "bundle", "ready in", "tokens/s", "peak memory"),
        [(
            tier["tier"], display.bytes_text(tier["bundle_bytes"]), f"{tier['load_s']:.2f} s",
            f"{tier['decode_tokens_per_s']:,.0f}", display.bytes_text(tier["peak_rss_bytes"]),
        ) for tier in answers],
    )


def _quantize(
    source: Path, out: Path, recipe: str, console: Console, *, replace: bool = False
) -> Record:
    from cloister.model.checkpoint import Checkpoint
    from cloister.model.recipe import Recipe
    from cloister.quantize.apply import quantize as apply

    chosen, checkpoint = Recipe.parse(recipe), Checkpoint.open(source)
    with display.stages(console, "quantize", 1) as progress:
        def step(done: int, total: int, name: str) -> None:
            if name:
                progress(f"{done + 1}/{total} {name}")

        report = apply(checkpoint, out, chosen, replace_existing=replace, progress=step)
    return {
        "recipe": report.recipe, "parameters": report.parameters, "size_bytes": report.size_bytes,
        "bits_per_parameter": report.bits_per_parameter,
        "tensors": [asdict(row) for row in report.rows],
    }


def _export(
    source: Checkpoint, out: Path, console: Console, **options: Any
) -> Record:
    from cloister import pipeline

    with display.stages(console, "export", len(pipeline.STAGES)) as progress:
        bundle, divergence = pipeline.export(source, out, progress=progress, **options)
    manifest = bundle.manifest
    return {
        "bundle": bundle.path.name, "model_id": bundle.model_id(manifest.programs[0]),
        "size_bytes": sum(entry.size for entry in manifest.files.values()),
        "program_against_checkpoint": divergence.to_dict(),
    }


def _show_receipt(record: Record) -> None:
    lost = record["program_against_checkpoint"]
    display.table(f"{record['bundle']}: the program against its checkpoint", ("", "measured"), [
        ("tokens", f"{lost['n']}"),
        ("mean KL divergence", f"{lost['mean_kld']:.2g} nats"),
        ("99 % of tokens under", f"{lost['p99_kld']:.2g} nats"),
        ("same most likely token", f"{lost['top1']:.2%}"),
        ("relative error of the logits", f"{lost['relative_error']:.2%}"),
        ("bundle", display.bytes_text(record["size_bytes"])),
    ])


def _answer(name: str, args: Namespace) -> Record:
    with Worker(debug=args.debug) as worker:  # one process a tier: its own peak memory
        loaded = worker.load(_bundle(name, args.family))
        text = "".join(piece.text for piece in worker.stream(args.prompt, **_request(args)))
        stats = worker.stats
    return {
        "tier": str(name), "text": text, "tokens": stats["tokens"], "finish": stats["finish"],
        "load_s": loaded["load_s"], "ttft_s": stats["ttft_s"],
        "decode_tokens_per_s": stats["decode_tokens_per_s"],
        "peak_rss_bytes": stats["peak_rss_bytes"], "cold": True,
    }


def _side_by_side(rows: list[Record]) -> None:
    display.table(
        "Side by side, each in a new process, one at a time",
        ("tier", "answer", "tokens/s", "first token", "ready in", "peak memory"),
        [(
            row["tier"], row["text"],
            f"{row['decode_tokens_per_s']:,.0f}" if row["decode_tokens_per_s"] else "-",
            f"{1000 * row['ttft_s']:.0f} ms", f"{row['load_s']:.2f} s",
            display.bytes_text(row["peak_rss_bytes"]),
        ) for row in rows], texts=2,
    )


def _bundle(name: str, family: Path | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name in list(Tier):
        path = reference.bundle_path(name, family)
        if path.is_dir():
            return path
        raise SettingError(
            f"The family has no {name} (at {Scale.REFERENCE} size); name a bundle instead."
        )
    raise SettingError(
        f"No bundle or tier is named {Path(name).name!r}; tiers are {', '.join(Tier)}."
    )


def _request(args: Namespace) -> Record:
    return {"system": args.system, "max_tokens": args.max_tokens, "sampling": _sampling(args)}


def _sampling(args: Namespace) -> Record:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(args, name) for name in names}


def _lines(*, prompts: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if prompts else "")
        except EOFError:
            return
        if not line:
            return
        yield line


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, style="dim")


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _entries(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _flat(record: Record, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value
