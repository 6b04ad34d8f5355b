"""Distillation from checkpoint to checkpoint.

A run keeps what it needs to resume in the folder OUT.run beside its output:

    state/             see `cloister.distill.state`
    metrics.jsonl      an object a step
    logits             the teacher's draws, where they were recorded and not sealed
    held-out.jsonl     examples held out of the data, unless the data is private
    samples-*.jsonl    the teacher's own conversations, where they are the data
    last-good/         the checkpoint that a loss which is not finite left behind

Everything imported here runs without torchao and ExecuTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from cloister import corpus
from cloister.distill import loop
from cloister.distill.answers import kept_samples
from cloister.distill.data import batch, one_pass
from cloister.distill.examples import SELF, check_lengths, encode, parted
from cloister.distill.measure import TOKENS, cross_entropy
from cloister.distill.parallel import Parallel, Sharded, read_plain
from cloister.distill.prune import Cut, Usage, check_shapes, check_vocabulary, fitted
from cloister.distill.schedule import TrainSettings
from cloister.distill.state import make_folder
from cloister.distill.teacher import FileStore, Sampled, check_draws, record
from cloister.errors import LossNotFinite, QuantizationError, SettingError
from cloister.files import check_output, disk_errors
from cloister.model.checkpoint import Checkpoint, Metadata, plan
from cloister.model.device import multiplies_bfloat16
from cloister.model.sense_file import carried
from cloister.model.transformer import initial_weights
from cloister.model.writer import CheckpointWriter
from cloister.progress import silent
from cloister.summary import Summary
from cloister.tiers import Scale, Shape, Tier, ladder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cloister.corpus import Example
    from cloister.distill.loop import Run
    from cloister.distill.teacher import Header, LogitStore
    from cloister.model.config import ModelConfig
    from cloister.model.sense_file import SenseFile, SenseKind
    from cloister.pairs import Pair
    from cloister.progress import Progress

__all__ = ["DistillReport", "DistillSettings", "Tensors", "check_source", "distill",
           "pruned", "run_folder", "write", "write_start"]

CALIBRATION = 512  # examples
SAMPLES = 512  # conversations
Tensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """The settings of a distillation.

    Raises:
        SettingError: a value outside its bound, or settings that do not fit together.
    """

    scale: Scale = Scale.REFERENCE  # of the ladder, where the student is a tier
    from_scratch: bool = False  # begin from noise, not from the pruned teacher
    samples: int = SAMPLES  # conversations that a teacher begins, where they are the data
    calibration: int = CALIBRATION  # examples, or so, that decide what is pruned
    # The teacher reads the data once, and the student learns from so many draws a token.
    draws: int | None = None
    # Where draws are sealed, see `SealedStore`; then everything made is its owner's to read only.
    store: Callable[[Header], LogitStore] | None = None
    # Share of the data that may be flawed or longer than the context, and is left out.
    tolerate: float = corpus.TOLERATED
    allow_overlap: bool = False  # of held-out requests with the data

    def __post_init__(self) -> None:
        for name in ("calibration", "samples"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be 1 at least.")
        if self.draws is not None:
            check_draws(self.draws)
            loop.check_recorded(self.objective, self.on_policy)
        elif self.store is not None:
            raise SettingError(
                "Only recorded draws need sealing; add --draws, or leave --private out.")


@dataclass(frozen=True, kw_only=True)
class DistillReport(Summary):
    """The result of a distillation; cross-entropies are nats a token of held-out answers."""

    identity: str  # of the student
    shape: Shape
    run: Run
    teacher: float
    before: float
    after: float
    too_long: tuple[str, ...] = ()  # places of the examples that the context does not hold
    left_out: tuple[str, ...] = ()  # senses of the teacher, whose vectors are of another size

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return the student's size, what training took and what it brought."""
        yield from (
            ("weights", f"{self.shape.parameters:,}"), ("training", self.run.in_words()),
            ("cross-entropy of the teacher", f"{self.teacher:.4f} nats a token, held out"),
            ("of the student before", f"{self.before:.4f}"), ("and after", f"{self.after:.4f}"),
            ("examples left out", f"{len(self.too_long):,}, longer than the context"))
        if self.left_out:
            yield "left out", f"{', '.join(self.left_out)}: its vectors are of another size"
        yield "checkpoint", self.identity

    def to_dict(self) -> dict[str, object]:
        """Return the report, JSON-ready."""
        return {
            "identity": self.identity, "steps": len(self.run.losses),
            "tokens": self.run.tokens, "seconds": round(self.run.seconds, 1),
            "loss": self.run.losses[-1],
            "held_out_cross_entropy": {
                "teacher": self.teacher, "before": self.before, "after": self.after,
            },
            "too_long": len(self.too_long), "left_out": list(self.left_out),
        }


def distill(
    teacher: Checkpoint | str | Path,
    out: str | Path,
    *,
    student: Tier | Shape,
    data: str | Path | Sequence[Example],
    held_out: str | Path | Sequence[Example] | None = None,
    settings: DistillSettings | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Teach a student what `teacher` knows, and write it to the checkpoint `out`.

    A tier has the teacher's vocabulary; `data` and `held_out`, which the student is measured on,
    are examples or files of them (see `cloister.corpus`); `SELF` as data are conversations that
    the teacher makes up (see `samples`). Without `held_out` 5 % of the data are held out. The
    checkpoint's `report` is a `DistillReport`. A run that was killed resumes when it is repeated.
    Under torchrun every process calls this, and has a shard of both models.

    Raises:
        QuantizationError: the teacher is quantized.
        SettingError: settings do not fit together, or a shape cannot be cut out of the teacher.
        VocabularyMismatch: the shape has another vocabulary than the teacher.
        DataError, OverlapError: the data cannot be used.
        TokenizerError: the teacher's tokenizer or template cannot serve.
        TrainingError, LossNotFinite, NotEnoughDisk, OutputUnwritable: see `loop.train`.
        OutputExists: `out` is taken, and `replace` is not set.
    """
    teacher = teacher if isinstance(teacher, Checkpoint) else Checkpoint.open(teacher)
    settings, out = settings or DistillSettings(), Path(out)
    config = fitted_config(teacher, student, settings)
    check_source(teacher, out, replace=replace)
    parallel = Parallel()
    if settings.draws is not None and parallel.world > 1:
        raise SettingError(
            "Recorded draws serve one process; run without torchrun, or without --draws.")
    if data == SELF:
        own = _own(teacher, out, settings, parallel, progress)
        data = encode(teacher, own, config.shape.context).examples  # nobody can shorten the others
    examples, measured_on = parted(
        data, held_out, tolerate=settings.tolerate, allow_overlap=settings.allow_overlap)
    name = str(student) if isinstance(student, Tier) else out.name
    parts = learnt, measured = [
        encode(teacher, each, config.shape.context) for each in (examples, measured_on)]
    task = _Task(
        teacher, config, name, settings, parallel, run_folder(out), learnt.pairs, measured.pairs,
        check_lengths(parts, settings.tolerate))
    with _owner_only(settings.store is not None, out, parallel):
        make_folder(task.folder)
        if held_out is None and settings.store is None and parallel.rank == 0:
            _write_examples(task.folder / "held-out.jsonl", measured.examples)
        return task.run(out, replace=replace, progress=progress if parallel.rank == 0 else silent)


@dataclass
class _Task:
    """One call of `distill`."""

    teacher: Checkpoint
    config: ModelConfig
    name: str
    settings: DistillSettings
    parallel: Parallel
    folder: Path
    data: list[Pair]
    held_out: list[Pair]
    too_long: tuple[str, ...]

    def run(self, out: Path, *, replace: bool, progress: Progress) -> Checkpoint:
        """Make the student, train it, write it and measure it."""
        settings, parallel, folder = self.settings, self.parallel, self.folder
        full = Sharded.load(self.teacher, parallel)  # float32
        progress("measure the teacher")
        teacher_entropy = cross_entropy(full, self.held_out)
        student = self._start(full, progress)
        before = cross_entropy(student, self.held_out)
        sampled = None
        if settings.draws is not None:
            sampled = self._recorded(full, settings.draws, progress)
        bfloat16 = settings.schedule.autocast and multiplies_bfloat16(parallel.device)
        if sampled is not None or bfloat16:
            del full  # its memory, before it is loaded again in half the size
        teacher = sampled or (
            Sharded.load(self.teacher, parallel, dtype=torch.bfloat16) if bfloat16 else full)
        try:
            run = loop.train(
                student, self.data, settings, folder, teacher=teacher, stage="distil",
                progress=progress,
                origin=f"{'noise' if settings.from_scratch else 'cut'} {self.teacher.identity} "
                       f"{settings.draws}")
        except LossNotFinite:
            if loop.restore(student, folder):
                write(
                    student, folder / "last-good", self._metadata(), self.teacher, replace=True,
                    senses=self._senses())
            raise
        checkpoint = write(
            student, out, self._metadata(), self.teacher, replace=replace, senses=self._senses())
        checkpoint.report = DistillReport(
            identity=checkpoint.identity, shape=self.config.shape, run=run, teacher=teacher_entropy,
            left_out=tuple(self.teacher.senses.keys() - self._senses().keys()),
            before=before, after=cross_entropy(student, self.held_out),
            too_long=self.too_long)
        return checkpoint

    def _metadata(self) -> Metadata:
        return replace(
            self.teacher.metadata, name=self.name, config=self.config, parent=self.teacher.identity,
            media=self.teacher.metadata.media if self._senses() else None)

    def _senses(self) -> dict[SenseKind, SenseFile]:
        """Return what reads pictures and recordings for the student: the teacher's, where it fits.

        A projector gives vectors of one size, the decoder's.
        """
        hidden = self.teacher.metadata.config.shape.hidden_size
        fits = self.config.shape.hidden_size == hidden and not self.settings.from_scratch
        return self.teacher.senses if fits else {}

    def _start(self, teacher: Sharded, progress: Progress) -> Sharded:
        """Return the student before it is trained: a part of its teacher, or noise."""
        if self.settings.from_scratch:
            weights: Tensors = initial_weights(self.config, self.settings.schedule.seed)
        else:
            progress("prune")
            self.config, weights = pruned(
                self.teacher, teacher, self.config.shape, self.data, self.settings.calibration)
        return write_start(self.folder, self._metadata(), weights, self.teacher, self.parallel)

    def _recorded(self, teacher: Sharded, draws: int, progress: Progress) -> Sampled:
        """Return the teacher's draws on the data, after making or completing them."""
        digest = hashlib.sha256()
        for prompt, answer in self.data:
            digest.update(repr((prompt, answer)).encode())
        vocabulary, seed = self.config.shape.vocab_size, self.settings.schedule.seed
        header: dict[str, str | int] = {
            "teacher": self.teacher.identity, "vocabulary": vocabulary, "draws": draws,
            "seed": seed, "data": digest.hexdigest(),
        }
        store = self.settings.store(header) if self.settings.store is not None else (
            FileStore(self.folder / "logits", header=header))
        device = self.parallel.device
        with torch.autocast(device.type, torch.bfloat16, enabled=(
            self.settings.schedule.autocast and multiplies_bfloat16(device)
        )):
            record(teacher.decoder, self.data, store, draws=draws, seed=seed, progress=progress)
        return Sampled(store, self.data, vocabulary)


class TokenizerFiles(Protocol):
    """The tokenizer files for a checkpoint, such as another checkpoint's."""

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer file."""

    @property
    def template_path(self) -> Path | None:
        """The chat template, where there is one."""


def run_folder(out: Path) -> Path:
    """Return the folder of the run that writes `out`: its state and metrics."""
    return out.with_name(f"{out.name}.run")


def check_source(source: Checkpoint, out: Path, *, replace: bool) -> None:
    """Raise before the work unless a checkpoint can be trained, and the result written to `out`.

    Raises:
        QuantizationError: `source` is quantized.
        OutputExists: `out` is taken, and `replace` is not set.
    """
    metadata = source.metadata
    if metadata.recipe is not None:
        todo = "name the one it was made from" if metadata.types is None else (
            "import the GGUF file without keeping its quantization")
        raise QuantizationError(
            f"Checkpoint {source.path.name} is quantized already ({metadata.recipe}); {todo}."
        )
    check_output(out, kind="checkpoint", replace=replace)


def pruned(
    source: Checkpoint, teacher: Sharded, shape: Shape, data: Sequence[Pair],
    calibration: int = CALIBRATION,
) -> tuple[ModelConfig, Tensors]:
    """Return configuration and weights of a decoder of `shape` cut out of `teacher`.

    `source` is its checkpoint, of which each tensor is read when it is asked for; see `Cut`. The
    `calibration` examples lie evenly over all: files are sorted by intent.
    """
    config, some = source.metadata.config, data[::max(1, -(-len(data) // calibration))]
    cut = Cut(config, shape, Usage(teacher, (
        batch(some, length, [row for row in rows if row])
        for length, rows in one_pass(some, TOKENS, 0, config.shape.context))))
    return cut.config, (
        (name, cut.tensor(name, lambda name: read_plain(source, name)))
        for name in plan(cut.config, None))


def write_start(
    folder: Path, metadata: Metadata, weights: Tensors, source: TokenizerFiles, parallel: Parallel
) -> Sharded:
    """Return a decoder with `weights`, of which no process ever has all.

    One process writes them to a checkpoint in `folder`, all read their part of it, and it is
    removed.
    """
    start = folder / "start"
    if parallel.rank == 0:
        with _writer(start, replace(metadata, media=None), source, replace=True) as writer:
            for name, value in weights:
                writer.add(name, value)
    parallel.wait()
    student = Sharded.load(Checkpoint.open(start), parallel)
    parallel.wait()
    if parallel.rank == 0:
        shutil.rmtree(start)
    return student


def write(
    model: Sharded, out: Path, metadata: Metadata, source: TokenizerFiles, *,
    dtype: torch.dtype = torch.float32, mean_with: Checkpoint | None = None, replace: bool = False,
    senses: Mapping[SenseKind, SenseFile] | None = None,
) -> Checkpoint:
    """Write a model's weights, one tensor whole at a time, with the tokenizer of `source`.

    Or their mean with those that the run began from, `mean_with`: the two ends of a run are often
    both worse than the middle between them (model soups, arXiv 2203.05482).

    Raises:
        OutputExists, NotEnoughDisk, OutputUnwritable: see `CheckpointWriter`.
    """
    weights, parallel = dict(model.decoder.named_parameters()), model.parallel
    with nullcontext() if parallel.rank else _writer(
        out, metadata, source, dtype=dtype, replace=replace, senses=senses
    ) as writer:
        for name in plan(metadata.config, None):
            value = parallel.full(weights[name].detach())
            if writer is not None:
                if mean_with is not None:
                    value = value.lerp(mean_with.tensor(name).to(value), 0.5)
                writer.add(name, value)
    parallel.wait()
    return Checkpoint.open(out)


def _writer(
    out: Path, metadata: Metadata, source: TokenizerFiles, *, dtype: torch.dtype = torch.float32,
    replace: bool, senses: Mapping[SenseKind, SenseFile] | None = None,
) -> CheckpointWriter:
    return CheckpointWriter(
        out, metadata=metadata, tensors=plan(metadata.config, None, dtype),
        tokenizer=source.tokenizer_path, template=source.template_path, replace=replace,
    ).with_senses(carried(senses or {}))


def fitted_config(
    teacher: Checkpoint, student: Tier | Shape, settings: DistillSettings
) -> ModelConfig:
    """Return the student's configuration, as far as pruning does not decide it.

    Raises:
        SettingError, VocabularyMismatch: see `check_shapes`; from scratch only the vocabulary
            must be the same.
    """
    config = teacher.metadata.config
    if isinstance(student, Tier):
        shape = ladder(settings.scale)[student]
        student = replace(
            shape, vocab_size=config.shape.vocab_size, tied=config.shape.tied,
            context=min(config.shape.context, shape.context))
    if not settings.from_scratch:
        check_shapes(config.shape, student)
    else:
        check_vocabulary(config.shape, student)
    # A pattern of layers goes on as it began.
    return fitted(config, student, [layer % config.shape.layers for layer in range(student.layers)])


def _own(
    teacher: Checkpoint, out: Path, settings: DistillSettings, parallel: Parallel,
    progress: Progress,
) -> list[Example]:
    """Return what the teacher says itself, which the first process makes and all read.

    Raises:
        SettingError: draws on it are to be sealed.
    """
    if settings.store is not None:
        raise SettingError(
            "What a teacher says itself is kept beside the run in plain text, so sealed draws on "
            "it hide nothing; name your data, or leave --private out.")
    def kept() -> list[Example]:
        return kept_samples(
            teacher, settings.samples, make_folder(run_folder(out)),
            seed=settings.schedule.seed, progress=progress)

    if parallel.rank == 0:
        kept()
    parallel.wait()
    return kept()


def _write_examples(path: Path, examples: list[Example]) -> None:
    with disk_errors(path.name):
        path.write_text("".join(
            json.dumps(each.to_dict()) + "\n" for each in examples), "utf-8")


@contextmanager
def _owner_only(private: bool, out: Path, parallel: Parallel) -> Iterator[None]:
    """Let only its owner read what the block makes: `out`, and the folder of its run."""
    if not private:
        yield
        return
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)
        for path in (out, run_folder(out)):
            if parallel.rank == 0 and path.exists():
                path.chmod(0o700)
