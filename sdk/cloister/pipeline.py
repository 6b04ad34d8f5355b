"""Joins the stages: a checkpoint is quantized, exported, checked, and becomes a bundle."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from cloister import bundle as bundles
from cloister.bundle import Bundle, Golden
from cloister.errors import BundleCorrupt, ExportMismatch, TokenizerError
from cloister.evaluate.divergence import Divergence, compare
from cloister.export import write
from cloister.manifest import FORMAT, Manifest, ProgramEntry
from cloister.message import Message
from cloister.runtime import _executorch
from cloister.runtime.engine import Engine
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloister.model.checkpoint import Checkpoint
    from cloister.model.transformer import Decoder
    from cloister.runtime.program import Program
    from cloister.settings import Settings

__all__ = ["CHECK_TOKENS", "MAX_KLD", "MIN_TOP1", "STAGES", "check_ids", "export", "verify"]

STAGES = ("read", *write.STAGES, "check", "golden")  # of an export
CHECK_TOKENS = 2048
CHECK_BATCH = 16  # conversations
MAX_KLD = 1e-3  # nats a token, mean
MIN_TOP1 = 0.99
MIN_MARGIN = 0.05  # logits; rounding differs between processors by less
GOLDEN_TOKENS = 64
_GOLDEN = (
    "Say something about the sea.", "What is seven times eight?", "Name three colours.",
    "Tell me a short story.", "Who are you?", "Write a haiku about rain.",
)


def check_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """The conversations, shipped with the package, that every export is checked on.

    At least CHECK_TOKENS ids in all, as the chat template lays them out. Where a template has no
    system role, the system prompt stands before the request.
    """
    text = resources.files("cloister.export").joinpath("check.jsonl").read_text("utf-8")
    conversations: list[list[int]] = []
    for line in text.splitlines():
        row = json.loads(line)
        try:
            prompt = _prompt(tokenizer, row["system"], row["prompt"])
        except TokenizerError:
            prompt = _prompt(tokenizer, None, f"{row['system']}: {row['prompt']}")
        conversations.append(prompt + tokenizer.encode(row["answer"]))
        if sum(map(len, conversations)) >= CHECK_TOKENS:
            return conversations
    return conversations


def export(
    source: Checkpoint,
    out: str | Path,
    *,
    backend: str = "xnnpack",
    chunk: int = write.DEFAULT_CHUNK,
    golden: Sequence[tuple[str | None, str]] | None = None,
    random_weights: bool = False,
    gate: Callable[[Path], None] = lambda directory: None,
    replace: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> tuple[Bundle, Divergence]:
    """Write the bundle of a quantized checkpoint, and what its program lost against it.

    `golden` are public prompts (system, prompt) of which those with a clear winner at every step
    go into the bundle. With `random_weights` only the divergence bounds the result: their logits
    have no winners. `gate` is given the finished bundle before it takes its place, and refuses it
    by raising. `progress` is called with each of STAGES as it begins.

    Raises:
        GateFailed: what `gate` raises.
        ExportMismatch: the program does not compute what the checkpoint computes.
        ExportError, SettingError: see `cloister.export.write.program`.
        VocabularyMismatch: the tokenizer has ids beyond the model's rows.
        OutputExists, NotEnoughDisk, BundleError: see `cloister.bundle.writer`.
    """
    metadata, shape = source.metadata, source.metadata.config.shape
    tokenizer = Tokenizer.from_files(source.tokenizer_path, source.template_path)
    tokenizer.check_vocabulary(shape.vocab_size)
    chunk = min(chunk, shape.context)
    size = sum(path.stat().st_size for path in source.path.iterdir())
    with bundles.writer(out, size_bytes=size, replace=replace) as directory:
        progress("read")
        decoder = source.load()
        entry = ProgramEntry(file=f"program.{backend}.pte", backend=backend)
        planned = write.program(
            decoder, metadata, directory / entry.file, backend=backend, chunk=chunk,
            progress=progress,
        )
        progress("check")
        program = _executorch.load(directory / entry.file, shape.layers, first="score")
        divergence = compare(_pairs(decoder, program, check_ids(tokenizer), chunk))
        _gate(divergence, random_weights)
        del decoder  # its memory, before `forward` packs the weights once more
        progress("golden")
        rows = _golden(
            program, tokenizer, golden or [(None, prompt) for prompt in _GOLDEN],
            metadata.eos, chunk, shape.context,
        )
        bundles.write_golden(directory / "golden.jsonl", rows)
        receipt = {
            "program_against_checkpoint": divergence.to_dict(),
            "weights": {"checkpoint": source.identity, "recipe": metadata.recipe},
        }
        (directory / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", "utf-8")
        for path in (source.tokenizer_path, source.template_path):
            if path is not None:
                (directory / path.name).write_bytes(path.read_bytes())
        bundles.finish(directory, functools.partial(
            Manifest, format=FORMAT, name=metadata.name, shape=shape, context=shape.context,
            prefill_chunk=chunk, recipe=metadata.recipe or "", programs=(entry,),
            executorch=planned.executorch, bos=metadata.bos, eos=metadata.eos,
            weight_bytes=planned.size_bytes, kv_bytes=planned.kv_bytes,
            arena_bytes=planned.arena_bytes, parent=source.identity,
        ))
        del program  # the gate loads one of its own
        gate(directory)
    return Bundle.open(out), divergence


def verify(path: str | Path, settings: Settings) -> dict[str, Any]:
    """Prove a bundle: every hash, and every golden prompt on this machine.

    Raises:
        BundleError: see `Bundle.open`; BundleCorrupt also where a golden prompt gives other ids.
    """
    bundle = Bundle.open(path)
    bundle.verify()
    engine = Engine(path, settings=settings)
    rows = bundle.golden()
    for number, row in enumerate(rows, start=1):
        ids = _prompt(engine.tokenizer, row.system, row.prompt)
        for position, wanted in enumerate(row.tokens):
            if int(engine.extend(ids).argmax()) != wanted:
                raise BundleCorrupt(
                    f"Golden prompt {number} of bundle {bundle.path.name} gives another token at "
                    f"position {position} on this machine; do not use it here."
                )
            ids.append(wanted)
    return {
        "model_id": engine.model_id,
        "checks": {
            "files": len(bundle.manifest.files),
            "golden_prompts": len(rows),
            "golden_tokens": sum(len(row.tokens) for row in rows),
        },
        "receipt": bundle.receipt(),
    }


def _pairs(
    decoder: Decoder, program: Program, conversations: list[list[int]], chunk: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of decoder and program on each conversation, float32[T, V] both.

    The decoder reads several at a time: it unpacks its weights again for every call.
    """
    for first in range(0, len(conversations), CHECK_BATCH):
        group = conversations[first:first + CHECK_BATCH]
        tokens_BT = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
        for row, ids in zip(tokens_BT, group, strict=True):
            row[:len(ids)] = torch.tensor(ids)  # what follows is masked by causality
        with torch.inference_mode():
            expected_BTV = decoder(tokens_BT)
        for expected_TV, ids in zip(expected_BTV, group, strict=True):
            got = [
                program.score(torch.tensor([ids[start:start + chunk]]), start)[0]
                for start in range(0, len(ids), chunk)
            ]
            yield expected_TV[:len(ids)], torch.cat(got)


def _gate(divergence: Divergence, random_weights: bool) -> None:
    if not divergence.mean_kld <= MAX_KLD or (
        not random_weights and divergence.top1 < MIN_TOP1
    ):
        raise ExportMismatch(
            f"The program differs from the checkpoint by a mean KL divergence of "
            f"{divergence.mean_kld:.2g} (at most {MAX_KLD:g}) and agrees on {divergence.top1:.2%} "
            f"of the most likely tokens (at least {MIN_TOP1:.0%}); nothing was written, report it."
        )


def _prompt(tokenizer: Tokenizer, system: str | None, prompt: str) -> list[int]:
    messages = [] if system is None else [Message(role="system", content=system)]
    return tokenizer.encode_chat([*messages, Message(role="user", content=prompt)])


def _golden(
    program: Program,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str | None, str]],
    eos: tuple[int, ...],
    chunk: int,
    context: int,
) -> list[Golden]:
    """Greedy ids of `prompts`, as far as the best logit leads by MIN_MARGIN."""
    rows = []
    for system, prompt in prompts:
        ids = _prompt(tokenizer, system, prompt)
        tokens: list[int] = []
        margin = float("inf")
        pending, start = list(ids), 0
        while len(tokens) < GOLDEN_TOKENS and start + len(pending) < context:
            while pending:
                part, pending = pending[:chunk], pending[chunk:]
                logits = program.forward(torch.tensor([part]), start)[0]
                start += len(part)
            best = logits.topk(2)
            gap = float(best.values[0] - best.values[1])
            if gap < MIN_MARGIN:
                break
            margin = min(margin, gap)
            tokens.append(int(best.indices[0]))
            if tokens[-1] in eos:
                break
            pending = tokens[-1:]
        if tokens:
            rows.append(Golden(
                system=system, prompt=prompt, tokens=tuple(tokens), margin=round(margin, 4)
            ))
    return rows
