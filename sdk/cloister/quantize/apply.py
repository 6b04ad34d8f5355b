"""Quantization from a checkpoint to a checkpoint, one matrix at a time."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.distill.examples import SELF, check_lengths, encode, examples_of
from cloister.distill.parallel import Parallel, read_plain
from cloister.distill.run import check_source, run_folder
from cloister.distill.state import make_folder
from cloister.model.checkpoint import Checkpoint, expected_tensors, plan
from cloister.model.device import device
from cloister.model.generate import width
from cloister.model.recipe import DEFAULT_RECIPE, Recipe
from cloister.model.writer import CheckpointWriter
from cloister.progress import silent
from cloister.quantize.calibrate import Calibration, LayerError
from cloister.quantize.encoders import SenseOptions, SenseReport, media_of, quantize_sense
from cloister.quantize.qat import check_groups, untied
from cloister.quantize.rounding import stored_tensors
from cloister.quantize.texts import COUNT, LENGTH, calibration_texts
from cloister.quantize.train import QatSettings, train_quantized
from cloister.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from cloister.corpus import Example
    from cloister.distill.loop import Run
    from cloister.model.recipe import Scheme
    from cloister.model.sense_file import SenseKind
    from cloister.pairs import Pair
    from cloister.progress import Progress

__all__ = ["Coverage", "QuantizeReport", "quantize"]

# Texts of its own that a model is trained on at a processor, each several times where that is too
# few.
MOST = 512


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The quantization of one tensor."""

    tensor: str
    shape: tuple[int, ...]
    bits: int  # an entry, without scales; 32 where it is not quantized
    group: int | None
    size_bytes: int  # scales included


@dataclass(frozen=True, kw_only=True)
class QuantizeReport(Summary):
    """The quantization of every tensor; none is left out."""

    identity: str  # of the quantized checkpoint
    recipe: str
    rows: tuple[Coverage, ...]
    run: Run | None = None  # of quantization-aware training
    layers: tuple[LayerError, ...] = ()  # of calibration
    senses: tuple[SenseReport, ...] = ()
    too_long: tuple[str, ...] = ()  # places of the data that the context does not hold

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights, scales included."""
        return sum(row.size_bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Entries of all weights; embedding and head count separately."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def bits_per_parameter(self) -> float:
        """Mean over all weights, scales included."""
        return 8 * self.size_bytes / self.parameters

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return the sizes, and what training or calibration took."""
        yield from (
            ("recipe", self.recipe), ("weights", f"{self.parameters:,}"),
            ("size", f"{self.size_bytes:,} bytes"),
            ("bits a weight", f"{self.bits_per_parameter:.2f}, scales included"))
        for bits, count in sorted(Counter(row.bits for row in self.rows).items()):
            yield f"tensors in {bits} bits", f"{count:,}"
        if self.run is not None:
            yield "training", self.run.in_words()
        if self.layers:
            yield "calibrated layers", f"{len(self.layers):,}"
        for sense in self.senses:
            error = "" if sense.error is None else f", vectors {sense.error:.1%} off"
            yield sense.sense, f"{sense.recipe}, {sense.size_bytes:,} bytes{error}"
        yield "checkpoint", self.identity

    def to_dict(self) -> dict[str, object]:
        """Return the report, JSON-ready."""
        record: dict[str, object] = {
            "identity": self.identity, "recipe": self.recipe, "parameters": self.parameters,
            "size_bytes": self.size_bytes, "bits_per_parameter": self.bits_per_parameter,
            "tensors": [asdict(row) for row in self.rows],
        }
        if self.run is not None:
            record |= {
                "steps": len(self.run.losses), "seconds": round(self.run.seconds, 1),
                "loss": self.run.losses[-1], "too_long": len(self.too_long),
            }
        if self.layers:
            record["layers"] = [asdict(layer) for layer in self.layers]
        if self.senses:
            record["senses"] = [asdict(sense) for sense in self.senses]
        return record


def quantize(
    source: Checkpoint | str | Path,
    out: str | Path,
    recipe: Recipe | str = DEFAULT_RECIPE,
    *,
    data: str | Path | Sequence[Example] | None = None,
    settings: QatSettings | None = None,
    calibrate: str | Path | Sequence[Example] | None = None,
    senses: SenseOptions | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Write `source` quantized to the checkpoint `out`, whose `report` is a `QuantizeReport`.

    With `calibrate`, "self" or data, rounded for what the layers read (see `Calibration`): "self"
    are texts that the model samples. With `data` or `settings`, trained for its rounding, from
    there or from the source, on `data` or on texts of its own; a killed run that is repeated
    resumes. Data are examples or files of them (see `cloister.corpus`). With none of it, memory
    stays near one float32 matrix above what the source maps.

    Raises:
        QuantizationError: the source is quantized already.
        SettingError: no recipe of that name.
        GroupSizeError: a group does not divide a layer's inputs; nothing was written.
        NonFiniteTensor: a weight is NaN or infinite; nothing was written.
        OutputExists: `out` is taken, and `replace` is not set.
        DataError, MediaUnreadable, MediaTooLarge: the data or media cannot be used.
        ContextExceeded, TokenizerError: see `cloister.distill.examples.encode`.
        TrainingError, LossNotFinite, NotEnoughDisk, OutputUnwritable: see
            `cloister.quantize.train.train_quantized`.
    """
    source = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    out, recipe = Path(out), recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    check_source(source, out, replace=replace)
    rounding = _Senses(source, senses or SenseOptions(), progress)
    tensors = expected_tensors(untied(source.metadata.config))
    check_groups(tensors, recipe)
    parallel = Parallel()
    progress = progress if parallel.rank == 0 else silent
    run, layers, too_long = None, tuple[LayerError, ...](), tuple[str, ...]()
    if data is not None or settings is not None:
        run, layers, too_long = _train(
            source, out, recipe, data, settings or QatSettings(), calibrate, rounding, replace,
            progress)
    elif parallel.rank == 0 and calibrate is not None:
        layers = _calibrate(
            source, out, recipe, calibrate, rounding, replace=replace, progress=progress)
    elif parallel.rank == 0:
        _write(
            _rounded(source, recipe, None, progress), source, out, recipe, rounding,
            replace=replace)
    parallel.wait()
    quantized = Checkpoint.open(out)
    quantized.report = QuantizeReport(
        identity=quantized.identity, recipe=recipe.name, run=run, layers=layers, too_long=too_long,
        senses=tuple(rounding.reports),
        rows=tuple(
            _coverage(name, shape, recipe.scheme_of(name)) for name, shape in tensors.items()))
    return quantized


def _train(
    source: Checkpoint, out: Path, recipe: Recipe, data: str | Path | Sequence[Example] | None,
    settings: QatSettings, calibrate: str | Path | Sequence[Example] | None, senses: _Senses,
    replace: bool, progress: Progress,
) -> tuple[Run, tuple[LayerError, ...], tuple[str, ...]]:
    """Write `out` after training, from calibrated weights where that is asked for."""
    parallel, start, layers = Parallel(), None, tuple[LayerError, ...]()
    pairs, too_long = _pairs(source, data, settings, progress)
    folder = make_folder(run_folder(out))
    if calibrate is not None:
        calibrated = folder / "calibrated"
        if parallel.rank == 0 and not _is_made(calibrated, source, recipe):
            layers = _calibrate(
                source, calibrated, recipe, calibrate, None, replace=True, progress=progress)
        parallel.wait()
        start = Checkpoint.open(calibrated)
    plain, run = train_quantized(
        source, folder, recipe, pairs, settings, start=start, progress=progress)
    if parallel.rank == 0:
        _write(
            _rounded(plain, recipe, start, progress), source, out, recipe, senses,
            replace=replace)
        for part in filter(None, (plain, start)):
            shutil.rmtree(part.path)
    return run, layers, too_long


def _is_made(calibrated: Path, source: Checkpoint, recipe: Recipe) -> bool:
    """Whether a killed run left the calibrated checkpoint behind."""
    if not calibrated.exists():
        return False
    done = Checkpoint.open(calibrated).metadata
    return (done.parent, done.recipe) == (source.identity, recipe.name)


def _coverage(name: str, shape: tuple[int, ...], scheme: Scheme | None) -> Coverage:
    if scheme is None:
        return Coverage(
            tensor=name, shape=shape, bits=32, group=None, size_bytes=4 * math.prod(shape))
    return Coverage(tensor=name, shape=shape, bits=scheme.bits, group=scheme.group,
                    size_bytes=scheme.size_bytes(shape[0], shape[1]))


def _pairs(
    source: Checkpoint, data: str | Path | Sequence[Example] | None, settings: QatSettings,
    progress: Progress,
) -> tuple[Sequence[Pair], tuple[str, ...]]:
    """Return what is trained on: data, and what of it is too long, or the model's own texts."""
    if data is not None:
        encoded = encode(source, examples_of(data, settings.tolerate),
                         source.metadata.config.shape.context)
        return encoded.pairs, check_lengths([encoded], settings.tolerate)
    count = (settings.schedule.steps or 0) * settings.schedule.tokens // LENGTH
    texts = calibration_texts(
        source, SELF, count=min(max(count, COUNT), MOST * width(device())), progress=progress)
    return [(ids[:1], ids[1:]) for ids in texts], ()


def _calibrate(
    source: Checkpoint, out: Path, recipe: Recipe, given: str | Path | Sequence[Example],
    senses: _Senses | None, *, replace: bool, progress: Progress,
) -> tuple[LayerError, ...]:
    """Write `source` rounded for what its layers read."""
    texts = calibration_texts(source, given, progress=progress)
    calibration = Calibration(source, recipe, texts)
    _write(calibration.tensors(progress), source, out, recipe, senses, replace=replace)
    return tuple(calibration.errors)


def _rounded(
    plain: Checkpoint, recipe: Recipe, start: Checkpoint | None, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of `plain` rounded by itself, with the scales of `start` if given."""
    names = list(expected_tensors(untied(plain.metadata.config)))
    for done, name in enumerate(names):
        progress("quantize", done, len(names), name)
        scheme = recipe.scheme_of(name)
        scale = None if start is None or scheme is None else start.tensor(f"{name}.scale")
        yield from stored_tensors(name, read_plain(plain, name).float(), scheme, scale)
    progress("quantize", len(names), len(names))


class _Senses:
    """How the senses of a checkpoint are quantized; `reports` says what it did to them."""

    def __init__(
        self, source: Checkpoint, options: SenseOptions, progress: Progress
    ) -> None:
        self._source, self._progress = source, progress
        self._recipe, media = Recipe.parse(options.recipe), options.media
        self._media = {} if media is None else media_of(source, media, progress=progress)
        self.reports: list[SenseReport] = []

    def writers(self) -> dict[SenseKind, Callable[[Path], object]]:
        """Return what writes the file of each (see `CheckpointWriter`).

        One that is quantized already, since models share it, is copied.
        """
        return {
            kind: partial(shutil.copyfile, file.path) if file.config.recipe else partial(
                self._write, kind)
            for kind, file in self._source.senses.items()}

    def _write(self, kind: SenseKind, path: Path) -> None:
        self.reports.append(quantize_sense(
            self._source.senses[kind], path, self._recipe, given=self._media.get(kind, ()),
            name=kind, progress=self._progress))


def _write(
    tensors: Iterator[tuple[str, torch.Tensor]], source: Checkpoint, out: Path, recipe: Recipe,
    senses: _Senses | None, *, replace: bool,
) -> None:
    """Write the quantized `tensors` of `source`, and its senses if not None."""
    config = untied(source.metadata.config)
    metadata = changed(source.metadata, config=config, recipe=recipe.name, parent=source.identity)
    with CheckpointWriter(
        out, tensors=plan(config, recipe), tokenizer=source.tokenizer_path,
        metadata=metadata if senses else changed(metadata, media=None),
        template=source.template_path, replace=replace,
    ).with_senses(senses.writers() if senses else {}) as writer:
        for name, value in tensors:
            writer.add(name, value)
