"""Joins the stages: a checkpoint is exported and checked, becomes a bundle, and is proved."""

from __future__ import annotations

import functools
import json
from contextlib import contextmanager
from dataclasses import replace as replaced
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from cloister import bundle as bundles
from cloister import pattern, prompt_format
from cloister.backend import XNNPACK
from cloister.bundle import Bundle
from cloister.errors import BundleCorrupt, CloisterError, ExportMismatch, IncompatibleProgram
from cloister.evaluate.divergence import compare
from cloister.export import check, further, golden, media_parts, parts, phone, write
from cloister.export.constants import prove_constants
from cloister.export.instrument import instrument
from cloister.export.media import Media
from cloister.export.streamed import streamed
from cloister.files import disk_errors
from cloister.manifest import FORMAT, Manifest, modalities
from cloister.model.checkpoint import Checkpoint
from cloister.model.sense_file import SenseKind
from cloister.progress import silent
from cloister.quantize.apply import quantize
from cloister.runtime import encoded
from cloister.runtime import phone as as_on_phones
from cloister.runtime.chat import Sampling
from cloister.runtime.core import Core, Rows
from cloister.runtime.engine import Engine
from cloister.runtime.generate import Decoding, generate
from cloister.runtime.program import load, runs_here
from cloister.runtime.sampling import Sampler
from cloister.settings import processor
from cloister.tokenizer import Tokenizer
from cloister.tokenizer_config import tokenizer_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from cloister.bundle import Golden, Pattern
    from cloister.manifest import ProgramEntry
    from cloister.model.checkpoint import Metadata
    from cloister.model.recipe import Recipe
    from cloister.pieces import MediaFormats
    from cloister.progress import Progress
    from cloister.runtime.core import MediaPosition, Position
    from cloister.settings import Settings

__all__ = ["export", "quantized", "verify"]


@contextmanager
def quantized(
    source: Checkpoint | str | Path, out: str | Path, recipe: Recipe | str,
    progress: Progress = silent,
) -> Iterator[Checkpoint]:
    """Give `source` quantized, in a folder beside `out` that is gone when the block ends.

    Each matrix is rounded by itself: for other ways see `cloister.quantize.apply.quantize`.

    Raises:
        QuantizationError, GroupSizeError, NonFiniteTensor, SettingError: see there.
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`.
    """
    source = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    out = Path(out).resolve()
    with disk_errors(out.name), TemporaryDirectory(
            prefix=f".{out.name}.", dir=out.parent) as folder:
        (Path(folder) / "source").symlink_to(source.path.resolve())  # for the report of the export
        yield quantize(source, Path(folder) / "quantized", recipe, progress=progress)


def export(
    source: Checkpoint | str | Path,
    out: str | Path,
    *,
    backends: Sequence[str] = ("xnnpack",),
    kv: str | None = None,
    chunk: int = write.DEFAULT_CHUNK,
    prompts: Sequence[tuple[str | None, str]] = (),
    gate: Callable[[Path], None] | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Write the bundle of a quantized checkpoint; its `report` is what the first program lost.

    `prompts` are public ones (system, prompt), of which those that the context holds, with a clear
    winner at every step, become golden rows; without any, a few of the package. `gate` is given
    the finished bundle before it takes its place, and refuses it by raising. All `backends` but the
    first give further programs (see `further`). The unquantized checkpoint is read for the report
    where it lies beside the source.

    Raises:
        GateFailed: what `gate` raises.
        ExportMismatch: the program does not compute what the checkpoint computes.
        ExportError, SettingError: see `cloister.export.write.program`.
        VocabularyMismatch: the tokenizer has ids beyond the model's rows.
        OutputExists, NotEnoughDisk, OutputUnwritable: see `cloister.bundle.writer`.
    """
    source = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    metadata, shape = source.metadata, source.metadata.config.shape
    tokenizer = Tokenizer.from_files(source.tokenizer_path, source.template_path, metadata)
    tokenizer.check_vocabulary(shape.vocab_size)
    chunk = min(chunk, shape.context)
    backend, *also = backends
    further.check_names(metadata, backend, also)
    size = sum(path.stat().st_size for path in source.path.iterdir())
    # The check needs a copy of the program for a while.
    with bundles.writer(out, size_bytes=(2 + len(also)) * size, replace=replace) as directory:
        progress("read")
        media = _media(source, chunk)
        entry = write.program(
            source, directory, backend=backend, kv=kv, chunk=chunk, progress=progress, media=media)
        _check_runs(entry)
        progress("check")
        report, run = _check(source, tokenizer, directory, entry, chunk, media)
        program = load(directory / entry.file, shape.layers)
        parts.prove_forward(program.forward, run)
        progress("golden")
        core = Core(program, name=metadata.name, context=shape.context, chunk=chunk,
                    reads_media=media is not None)
        rows = _golden(core, metadata, _asked(core, tokenizer, prompts), report)
        bundles.write_golden(directory, rows)
        del core, program  # the others load one of their own
        _prove_on_phones(directory, entry, shape.layers, rows, chunk, metadata.media)
        made = _further(source, tokenizer, directory, also, chunk, rows, progress)
        _finish(directory, source, tokenizer, [(entry, {}), *made], chunk, report)
        if gate is not None:
            gate(directory)
    bundle = Bundle.open(out)
    bundle.report = report
    return bundle


def verify(path: str | Path, settings: Settings) -> dict[str, Any]:
    """Prove a bundle: every hash, its prompt format, and every golden row on this machine.

    Raises:
        BundleError: see `Bundle.open`; BundleCorrupt also where a golden prompt gives other ids,
            or the prompt format others than the chat template.
        IncompatibleProgram: it does not run as on phones.
    """
    bundle = Bundle.open(path)
    bundle.verify()
    engine = Engine(path, settings=settings)
    said = bundle.manifest.prompt_format
    if said is not None and not prompt_format.prove(said, engine.tokenizer, bundle.path):
        raise BundleCorrupt(
            f"The prompt format of bundle {bundle.path.name} is not its chat template's; export "
            "it again."
        )
    rows = bundle.golden()
    for number, row in enumerate(rows, start=1):
        decoding = Decoding(sampler=Sampler(Sampling()), limit=len(row.tokens))
        shown = [] if row.media is None else engine.media(pattern.of(
            bundle.manifest.media, row.media.kind, row.media.seed))
        answer = generate(engine, [*shown, *row.prompt], decoding)
        for position, (wanted, choice) in enumerate(zip(row.tokens, answer, strict=False)):
            if choice.id != wanted:
                raise BundleCorrupt(
                    f"Golden prompt {number} of bundle {bundle.path.name} gives another token at "
                    f"position {position} on this machine; do not use it here."
                )
        answer.close()
    entry, shape = bundle.program(runs_here), bundle.manifest.shape
    phones = entry.backend == XNNPACK.name
    failing = phones and as_on_phones.complaint(
        bundle.path / entry.file, shape.layers, rows, bundle.manifest.prefill_chunk,
        bundle.manifest.media)
    if failing:
        raise IncompatibleProgram(
            f"Bundle {bundle.path.name} fails with XNNPACK's weights cache on, as phones have it "
            f"({failing}); export it again.")
    return {
        "model_id": engine.model_id,
        "checks": {
            "files": len(bundle.manifest.files),
            "golden_prompts": len(rows),
            "golden_tokens": sum(len(row.tokens) for row in rows),
            **({} if bundle.manifest.media is None else {
                "golden_media": sum(row.media is not None for row in rows)}),
            "as_on_phones": phones,
            "prompt_format": said is not None,
            "programs": {
                entry.backend: "golden prompts" if entry.backend == engine.backend
                else f"sha256 only; {entry.note or 'not run'}"
                for entry in bundle.manifest.programs},
        },
        "receipt": bundle.receipt(),
    }


def _media(source: Checkpoint, chunk: int) -> Media | None:
    """Return what a program needs for the pictures and recordings that a checkpoint reads."""
    formats, config = source.metadata.media, source.metadata.config
    if formats is None:
        return None
    senses = {kind: file.load() for kind, file in source.senses.items()}
    media = Media(
        formats=formats, vision=senses.get(SenseKind.VISION), audio=senses.get(SenseKind.AUDIO))
    most = write.longest(config, chunk, both_ways=media.both_ways)
    return replaced(media, most=max(most, media.whole))


def _check(
    source: Checkpoint, tokenizer: Tokenizer, directory: Path, entry: ProgramEntry, chunk: int,
    media: Media | None
) -> tuple[check.CheckReport, parts.Recording]:
    """Prove the program in `directory`, and measure what it lost.

    Also return what its method `score` gives for some tokens. One program is loaded at a time, and
    of checkpoints no more than a layer.
    """
    shape, path = source.metadata.config.shape, directory / entry.file
    texts = check.conversations(
        tokenizer, shape.context, check.tokens_for(shape.parameters))
    ids = check.distinct(texts, shape.vocab_size)
    copy = path.with_name("instrumented.pte")
    calls = instrument(path, copy)
    runs = parts.record(load(copy, shape.layers, first="score"), ids, chunk, shape.context)
    copy.unlink()
    decoder = streamed(source, entry.backend)
    constants_bytes = prove_constants(path, write.stored(
        entry.backend, decoder, source.tensor, None if media is None else media.senses))
    gaps = [gap for run in runs for gap in parts.gaps(decoder, run, calls, entry.kv)]
    worst = parts.prove_parts(gaps)
    program = load(path, shape.layers, first="score")
    again = parts.record(program, ids, chunk, shape.context)
    parts.prove_same(again, runs)
    if media is not None:
        found = media_parts.gaps(
            path, decoder, media, lambda file, first: load(file, shape.layers, first=first),
            again[-1])
        gaps += found
        worst = max(worst, parts.prove_parts(found), key=lambda gap: gap.size)
    del runs
    core = Core(program, name=source.metadata.name, context=shape.context, chunk=chunk)
    parent = _parent_beside(source)
    divergences = check.measure(
        functools.partial(_score, core), texts, check.Reading(decoder, texts), compare,
        None if parent is None else check.Reading(streamed(parent), texts),
    )
    return check.CheckReport(
        parts=len(gaps), worst=worst, constants_bytes=constants_bytes, divergences=divergences,
        parent=source.metadata.parent,
    ), again[-1]


def _check_runs(entry: ProgramEntry) -> None:
    if not runs_here(entry):
        raise IncompatibleProgram(
            f"A program for {entry.backend} does not run here, so that it cannot be checked; see "
            "what `cloister kernels build` says, or use --backend xnnpack.")


def _prove_on_phones(
    directory: Path, entry: ProgramEntry, layers: int, rows: list[Golden], chunk: int,
    media: MediaFormats | None
) -> None:
    failing = entry.backend == XNNPACK.name and as_on_phones.complaint(
        directory / entry.file, layers, rows, chunk, media)
    if failing:
        raise ExportMismatch(
            f"With XNNPACK's weights cache on, as phones have it, the program fails ({failing}); "
            "nothing was written, report it.")


def _asked(
    core: Core, tokenizer: Tokenizer, prompts: Sequence[tuple[str | None, str]]
) -> list[list[int]]:
    """Return the ids of the prompts of golden rows that the context holds."""
    asked = [(*each, "") for each in prompts] or [(None, *each) for each in golden.PROMPTS]
    laid_out = (
        check.lay_out(tokenizer, system, prompt) + (tokenizer.encode(begun) if begun else [])
        for system, prompt, begun in asked)
    return [ids for ids in laid_out if len(ids) < core.context]


def _golden(
    core: Core, metadata: Metadata, asked: Sequence[list[int]], report: check.CheckReport
) -> list[Golden]:
    """Return the golden rows of the prompts `asked`, and of media that the program reads."""
    least = golden.margin(report.divergences.program_from_checkpoint.mean_kld)
    rows = golden.rows(asked, functools.partial(_answer, core), metadata.eos, least)
    if metadata.media is None:
        return rows
    return rows + _golden_media(core, metadata.media, asked, metadata.eos, least)


def _golden_media(
    core: Core, media: MediaFormats, asked: Sequence[list[int]], eos: tuple[int, ...], least: float
) -> list[Golden]:
    """Return a golden row of each kind of media that the program reads."""

    @functools.cache
    def shown(kind: str, seed: int, wobble: int) -> list[MediaPosition]:
        part = pattern.of(media, kind, seed, wobble)
        form = media.of(part)
        vectors = encoded.encode(core.program, form, part)
        return encoded.positions(form, encoded.digest(b"", part), vectors, len(vectors))

    def answer(noise: Pattern, wobble: int, ids: list[int]) -> Iterator[tuple[int, float]]:
        positions: list[Position] = [*shown(noise.kind, noise.seed, wobble), *ids]
        return _answer(core, positions) if len(positions) < core.context else iter(())

    kinds: tuple[Literal["picture", "recording"], ...] = ("picture", "recording")
    found = [
        golden.media_row(kind, asked[:2], answer, eos, least)
        for kind in kinds if getattr(media, kind) is not None]
    return [row for row in found if row is not None]


def _further(
    source: Checkpoint, tokenizer: Tokenizer, directory: Path, names: Sequence[str], chunk: int,
    rows: list[Golden], progress: Progress,
) -> list[tuple[ProgramEntry, dict[str, object]]]:
    """Write the programs for the backends called `names`; return their entries and receipts.

    One that runs here is proved like the first, and gives its golden rows.
    """
    shape = source.metadata.config.shape
    made: list[tuple[ProgramEntry, dict[str, object]]] = []
    for name in names:
        progress(name)
        if name == XNNPACK.name:
            entry = write.program(source, directory, backend=name, chunk=chunk)
            report, run = _check(source, tokenizer, directory, entry, chunk, None)
            parts.prove_forward(load(directory / entry.file, shape.layers).forward, run)
            _prove_on_phones(directory, entry, shape.layers, rows, chunk, None)
            made.append((entry, {"backend": name, **report.to_dict()}))
            continue
        texts = check.conversations(tokenizer, shape.context, further.TOKENS)
        made.append(further.program(
            source, directory, name, chunk=chunk, ids=check.distinct(texts, shape.vocab_size),
            compare=compare))
    return made


def _parent_beside(source: Checkpoint) -> Checkpoint | None:
    """Return the checkpoint in the same folder as `source` that it was quantized from, if any."""
    shape = source.metadata.config.shape
    for path in sorted(source.path.resolve().parent.iterdir()):
        try:
            found = Checkpoint.open(path)
        except (CloisterError, OSError):  # whatever lies there
            continue
        if (found.metadata.recipe is None
                and replaced(found.metadata.config.shape, tied=shape.tied) == shape
                and found.identity == source.metadata.parent):
            return found
    return None


def _finish(
    directory: Path, source: Checkpoint, tokenizer: Tokenizer,
    programs: Sequence[tuple[ProgramEntry, dict[str, object]]], chunk: int,
    report: check.CheckReport,
) -> None:
    """Put receipt and the checkpoint's own files beside the program, and write the manifest."""
    origin = source.metadata.origin
    bundles.write_receipt(directory, {
        **report.to_dict(),
        "measured_on": processor(),
        "weights": {
            "checkpoint": source.identity, "recipe": source.metadata.recipe,
            "origin": None if origin is None else origin.to_dict(),
        },
        "further_programs": [said for _, said in programs if said],
        "phone_tokenizer": {
            "reason": phone.complaint(
                source.tokenizer_path, tokenizer, [prompt for prompt, _ in golden.PROMPTS])},
        "ran": [{"executorch": write.release(), "weights_cache": cache} for cache in (
            (False, True) if programs[0][0].backend == XNNPACK.name else (False,))],
    })
    for path in filter(None, (source.tokenizer_path, source.template_path)):
        (directory / path.name).write_bytes(path.read_bytes())
    metadata, shape = source.metadata, source.metadata.config.shape
    config = tokenizer_config(source.tokenizer_path, source.template_path, metadata)
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1, ensure_ascii=False) + "\n", "utf-8")
    said, reason = prompt_format.derive(tokenizer, source.path)
    bundles.finish(directory, functools.partial(
        Manifest, format=FORMAT, name=metadata.name, shape=shape, context=shape.context,
        prefill_chunk=chunk, recipe=metadata.recipe or "",
        programs=tuple(entry for entry, _ in programs), executorch=write.release(),
        bos=metadata.bos, eos=metadata.eos,
        special_tokens=metadata.special_tokens,
        special_ids=prompt_format.special_ids(source.path), prompt_format=said,
        prompt_format_reason=reason, modalities=modalities(metadata.media),
        parent=source.identity, media=metadata.media,
    ))


def _score(core: Core, ids: list[int]) -> torch.Tensor:
    """Logits after each of `ids`, float32[T, V]."""
    core.truncate(0)
    return core.extend(ids, Rows.ALL).clone()


def _answer(core: Core, prompt: Sequence[Position]) -> Iterator[tuple[int, float]]:
    """Greedy ids after `prompt` and the gap between the two best logits of each."""
    for choice in generate(core, prompt, Decoding(sampler=Sampler(Sampling()), top=2)):
        (_, best), (_, second) = choice.top
        yield choice.id, best - second
