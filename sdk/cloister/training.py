"""Joins data, checkpoints and the training loop: a checkpoint becomes a smaller one, or one that
bears quantization.

Everything that `distill` imports runs without torchao and ExecuTorch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloister.distill import loop
from cloister.distill.data import pairs
from cloister.distill.losses import Objective
from cloister.distill.measure import cross_entropy
from cloister.distill.optimizer import Kind
from cloister.distill.parallel import Parallel
from cloister.distill.prune import fitted, prune
from cloister.distill.state import make_folder, read_state
from cloister.distill.teacher import FileStore, Sampled, record
from cloister.errors import (
    LossNotFinite,
    QuantizationError,
    SettingError,
    TokenizerError,
    TrainingError,
)
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.transformer import Decoder
from cloister.model.writer import CheckpointWriter, check_output
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console

    from cloister.corpus import Example
    from cloister.distill.data import Pair
    from cloister.distill.loop import Run
    from cloister.distill.schedule import OnPolicy, Schedule
    from cloister.distill.teacher import LogitStore
    from cloister.model.recipe import Recipe
    from cloister.tiers import Shape
    from cloister.vault.namespace import Namespace

__all__ = ["Outcome", "bearing", "calibration", "distill", "encode", "run_folder",
           "train_quantized", "write"]

CALIBRATION = 512  # examples that decide what is pruned
# Of training to bear quantization. On data that it has learnt a teacher is so sure that little but
# its first choice is taught; softened, it teaches what new data will ask for, too.
_BEARING = Objective(hard=0.0, temperature=2.0)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a student became; cross-entropies are nats a token of held-out answers."""

    checkpoint: Checkpoint
    run: Run
    teacher: float
    before: float
    after: float

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "identity": self.checkpoint.identity, "steps": len(self.run.losses),
            "tokens": self.run.tokens, "seconds": round(self.run.seconds, 1),
            "loss": self.run.losses[-1],
            "held_out_cross_entropy": {
                "teacher": self.teacher, "before": self.before, "after": self.after,
            },
        }


def encode(source: Checkpoint, examples: Iterable[Example], context: int) -> list[Pair]:
    """Examples in the ids of a checkpoint's tokenizer and chat template.

    Raises:
        TokenizerError: the checkpoint names no token that ends an answer.
        ContextExceeded: an example does not fit.
    """
    if not source.metadata.eos:
        raise TokenizerError(
            f"Checkpoint {source.path.name} names no token that ends an answer; import it anew "
            "from a directory whose generation_config.json does."
        )
    tokenizer = Tokenizer.from_files(source.tokenizer_path, source.template_path)
    return pairs(tokenizer, examples, source.metadata.eos[0], context)


def run_folder(out: Path) -> Path:
    """Where a run keeps what it needs to go on, and its metrics."""
    return out.with_name(f"{out.name}.run")


def distill(
    source: Checkpoint,
    out: Path,
    *,
    shape: Shape,
    name: str,
    data: Sequence[Pair],
    held_out: Sequence[Pair],
    schedule: Schedule,
    objective: Objective | None = None,
    on_policy: OnPolicy | None = None,
    draws: int | None = None,
    space: Namespace | None = None,
    from_scratch: bool = False,
    compiled: bool = False,
    replace_existing: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Teach a student of `shape` what `source` knows, and write it to the checkpoint `out`.

    The student begins as a pruned teacher, or with `from_scratch` as noise. With `draws` the
    teacher reads the data once, and the student learns from that many draws a token, kept in
    `run_folder(out)`, or sealed in `space`: they tell what the data says. Without, the teacher
    reads along. A run that is killed goes on when it is repeated. What a loss that is not finite
    left behind is the checkpoint `last-good` in the run's folder.

    Raises:
        QuantizationError: the teacher is quantized.
        SettingError: settings do not fit together.
        VocabularyMismatch: the shape has another vocabulary than the teacher.
        TrainingError, NotEnoughDisk: see `cloister.distill.loop.train`.
        OutputExists: `out` is taken, and `replace_existing` is not set.
    """
    _check(source, out, replace_existing=replace_existing)
    objective, parallel = objective or Objective(), Parallel()
    if draws is not None:
        if parallel.world > 1:
            raise SettingError(
                "Recorded draws serve one process; run without torchrun, or without --draws.")
        loop.check_recorded(objective, on_policy)
    teacher = source.load().to(parallel.device)
    if from_scratch:
        depth = teacher.config.shape.layers
        student = Decoder(fitted(  # a pattern of layers goes on as it began
            teacher.config, shape, [layer % depth for layer in range(shape.layers)]))
        student.initialize(schedule.seed)
    else:
        student = prune(teacher, shape, calibration(data, shape.context))
    student.to(parallel.device)
    losses = [cross_entropy(decoder, held_out) for decoder in (teacher, student)]
    folder = make_folder(run_folder(out))
    guide: Decoder | Sampled = teacher
    if draws is not None:
        guide = _recorded(
            source, teacher, data, folder, draws, schedule.seed, space, console)
    del teacher  # its memory, where its draws stand for it
    metadata = replace(
        source.metadata, name=name, config=student.config, parent=source.identity)
    keep = functools.partial(
        write, folder, metadata=metadata, tokenizer=source.tokenizer_path,
        template=source.template_path)
    try:
        run = loop.train(
            student, data, schedule, folder / "state", objective=objective, teacher=guide,
            on_policy=on_policy, metrics=folder / "metrics.jsonl", parallel=parallel,
            compiled=compiled, title=name, console=console,
            origin=f"{'noise' if from_scratch else 'cut'} {source.identity} {draws}",
        )
    except LossNotFinite:
        if parallel.rank == 0 and (folder / "state").exists():
            keep(folder / "last-good", replace_existing=True)
        raise
    if parallel.rank == 0:
        keep(out, replace_existing=replace_existing)
    parallel.wait()
    checkpoint = Checkpoint.open(out)
    return Outcome(
        checkpoint=checkpoint, run=run, teacher=losses[0], before=losses[1],
        after=cross_entropy(checkpoint.load().to(parallel.device), held_out),
    )


def bearing(schedule: Schedule) -> Schedule:
    """`schedule` as `train_quantized` follows it: AdamW, no weight decay, a rate that only falls.

    Weights are to stay near where they are, each to find a rounding that serves: what moves all
    of a matrix together, as Muon and weight decay do, works against it. After 100 steps of Nano-1
    AdamW took away 79 % of the KL divergence on held-out tool calls, 74 % on intents, 88 % on
    redactions and 55 % on tales, Muon 68, 64, 67 and 46 (both at a rate of 2e-4).
    """
    return replace(
        schedule, optimizer=Kind.ADAMW, weight_decay=0.0, decay=1.0, autocast=False)


def train_quantized(
    source: Checkpoint,
    out: Path,
    *,
    recipe: Recipe,
    data: Sequence[Pair],
    schedule: Schedule,
    folder: Path,
    compiled: bool = False,
    replace_existing: bool = False,
    console: Console | None = None,
) -> Run:
    """Quantize `source` to `out` after training it to bear that, by its unquantized self.

    Of `schedule` some is set by `bearing`. `folder` keeps what a killed run goes on from.

    Raises:
        QuantizationError, GroupSizeError: see `cloister.quantize.apply.quantize`.
        TrainingError, NotEnoughDisk: see `cloister.distill.loop.train`.
        OutputExists: `out` is taken, and `replace_existing` is not set.
    """
    from cloister.quantize.apply import quantize
    from cloister.quantize.qat import prepare

    _check(source, out, replace_existing=replace_existing)
    parallel = Parallel()
    teacher = source.load().to(parallel.device)
    student = prepare(teacher, recipe)
    make_folder(folder)
    run = loop.train(
        student, data, bearing(schedule), folder / "state",
        objective=_BEARING, teacher=teacher, metrics=folder / "metrics.jsonl",
        parallel=parallel, compiled=compiled, origin=f"{recipe.name} {source.identity}",
        title=recipe.name, console=console,
    )
    if parallel.rank == 0:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            plain = write(
                folder, Path(scratch) / "plain", replace(source.metadata, config=student.config),
                tokenizer=source.tokenizer_path, template=source.template_path,
            )
            quantize(
                plain, out, recipe, parent=source.identity, replace_existing=replace_existing)
    parallel.wait()
    return run


def _check(source: Checkpoint, out: Path, *, replace_existing: bool) -> None:
    """What would be refused after hours is refused before."""
    if source.metadata.recipe is not None:
        raise QuantizationError(
            f"Checkpoint {source.path.name} is quantized ({source.metadata.recipe}); name the one "
            "it was made from."
        )
    check_output(out, replace=replace_existing)


def write(
    folder: Path, out: Path, metadata: Metadata, *, tokenizer: Path, template: Path | None,
    dtype: torch.dtype = torch.float32, replace_existing: bool = False,
    mean_with: Checkpoint | None = None,
) -> Checkpoint:
    """The weights of the run in `folder` as a checkpoint of plain tensors.

    Or their mean with those that the run began from, `mean_with`: the two ends of a run are often
    both worse than the middle between them (model soups, arXiv 2203.05482).

    Raises:
        OutputExists, NotEnoughDisk, CheckpointError: see `CheckpointWriter`.
    """
    weights = read_state(folder / "state")["weights"]
    tensors = plan(metadata.config, None, dtype)
    with CheckpointWriter(
        out, metadata=metadata, tensors=tensors, tokenizer=tokenizer, template=template,
        replace=replace_existing,
    ) as writer:
        for name in tensors:
            reached = weights[name]
            writer.add(name, reached if mean_with is None else reached.lerp(
                mean_with.tensor(name).to(reached.dtype), 0.5))
    return Checkpoint.open(out)


def calibration(data: Sequence[Pair], context: int) -> Iterator[torch.Tensor]:
    """Tokens int64[1, T] of CALIBRATION examples or so, each alone.

    Evenly over the whole, not the first: files are sorted by intent.
    """
    for prompt, answer in data[::max(1, -(-len(data) // CALIBRATION))]:
        yield torch.tensor([[*prompt, *answer][:context]])


def _recorded(
    source: Checkpoint, teacher: Decoder, data: Sequence[Pair], folder: Path, draws: int,
    seed: int, space: Namespace | None, console: Console | None,
) -> Sampled:
    """The teacher's draws on `data`, made or completed in `folder`, or sealed in `space`."""
    digest = hashlib.sha256()
    for prompt, answer in data:
        digest.update(repr((prompt, answer)).encode())
    header: dict[str, str | int] = {
        "teacher": source.identity, "vocabulary": teacher.config.shape.vocab_size,
        "draws": draws, "seed": seed, "data": digest.hexdigest(),
    }
    store: LogitStore = FileStore(folder / "logits", header=header) if space is None else (
        SealedStore(space, header))
    record(teacher, data, store, draws=draws, seed=seed, console=console)
    return Sampled(store, data, teacher.config.shape.vocab_size)


class SealedStore:
    """A teacher's draws in the vault, an object a run (see `distill.teacher.LogitStore`)."""

    def __init__(self, space: Namespace, header: Mapping[str, str | int]) -> None:
        from cloister.vault.namespace import Kind

        self._space, self._kind = space, Kind.DISTILL
        self._name = json.dumps(dict(header), sort_keys=True).encode()
        self._held = set(space.numbers(self._kind, self._name))

    def put(self, key: int, record: bytes) -> None:
        """Keep a record.

        Raises:
            NotEnoughDisk, VaultError: see `Namespace.put`.
        """
        self._space.put(self._kind, self._name, record, number=key)
        self._held.add(key)

    def get(self, key: int) -> bytes:
        """The record of an example.

        Raises:
            TrainingError: there is none.
            VaultDamaged: it is not what was written.
        """
        record = self._space.get(self._kind, self._name, number=key)
        if record is None:
            raise TrainingError(f"Example {key + 1} has no recorded draws; record them first.")
        return record

    def __contains__(self, key: int) -> bool:
        return key in self._held

    def flush(self) -> None:
        """Nothing: every record that was put stays."""
