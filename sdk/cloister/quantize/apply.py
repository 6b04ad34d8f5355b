"""Quantization from a checkpoint to a checkpoint, one matrix at a time."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.distill.parallel import Parallel, read_plain
from cloister.distill.run import check_source, examples_of, run_folder
from cloister.errors import SettingError
from cloister.model.checkpoint import Checkpoint, expected_tensors, plan
from cloister.model.recipe import DEFAULT_RECIPE, Recipe
from cloister.model.writer import CheckpointWriter
from cloister.progress import silent
from cloister.quantize.calibrate import Calibration, LayerError
from cloister.quantize.qat import check_groups, untied
from cloister.quantize.rounding import stored_tensors
from cloister.quantize.texts import calibration_texts
from cloister.quantize.train import QatSettings, train_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from cloister.corpus import Example
    from cloister.distill.loop import Run
    from cloister.model.recipe import Scheme
    from cloister.progress import Progress

__all__ = ["Coverage", "QuantizeReport", "quantize"]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The quantization of one tensor."""

    tensor: str
    shape: tuple[int, ...]
    bits: int  # an entry, without scales; 32 where it is not quantized
    group: int | None
    size_bytes: int  # scales included


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The quantization of every tensor; none is left out."""

    identity: str  # of the quantized checkpoint
    recipe: str
    rows: tuple[Coverage, ...]
    run: Run | None = None  # of quantization-aware training
    layers: tuple[LayerError, ...] = ()  # of calibration
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
        return record


def quantize(
    source: Checkpoint | str | Path,
    out: str | Path,
    recipe: Recipe | str = DEFAULT_RECIPE,
    *,
    data: str | Path | Sequence[Example] | None = None,
    settings: QatSettings | None = None,
    calibrate: str | Path | Sequence[Example] | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Write `source` quantized to the checkpoint `out`, whose `report` is a `QuantizeReport`.

    With `data`, examples or files of them (see `cloister.corpus`), after quantization-aware
    training on it by `settings`, which resumes when a killed run is repeated. With `calibrate`,
    "self" or data likewise, rounded for what the layers read (see `Calibration`). With neither,
    memory stays near one float32 matrix above what the source maps.

    Raises:
        QuantizationError: the source is quantized already.
        SettingError: no recipe of that name, or both training and calibration.
        GroupSizeError: a group does not divide a layer's inputs; nothing was written.
        NonFiniteTensor: a weight is NaN or infinite; nothing was written.
        OutputExists: `out` is taken, and `replace` is not set.
        DataError: the data cannot be used.
        TrainingError, LossNotFinite, NotEnoughDisk, OutputUnwritable: see
            `cloister.quantize.train.train_quantized`.
    """
    source = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    out, recipe = Path(out), recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    check_source(source, out, replace=replace)
    tensors = expected_tensors(untied(source.metadata.config))
    check_groups(tensors, recipe)
    if data is not None and calibrate is not None:
        raise SettingError("What is trained for its rounding is not calibrated; leave one out.")
    parallel, plain, run, too_long = Parallel(), source, None, tuple[str, ...]()
    progress, settings = progress if parallel.rank == 0 else silent, settings or QatSettings()
    if data is not None:
        plain, run, too_long = train_quantized(
            source, run_folder(out), recipe, examples_of(data, settings.tolerate), settings,
            progress=progress)
    layers: tuple[LayerError, ...] = ()
    if parallel.rank == 0:
        made = _plainly(plain, recipe, progress)
        if calibrate is not None:
            calibration = Calibration(
                source, recipe, calibration_texts(source, calibrate, progress=progress))
            made = calibration.tensors(progress)
        _write(made, plain, out, recipe, source.identity, replace=replace)
        if calibrate is not None:
            layers = tuple(calibration.errors)
        if plain is not source:
            shutil.rmtree(plain.path)
    parallel.wait()
    quantized = Checkpoint.open(out)
    quantized.report = QuantizeReport(
        identity=quantized.identity, recipe=recipe.name, run=run, layers=layers, too_long=too_long,
        rows=tuple(
            _coverage(name, shape, recipe.scheme_of(name)) for name, shape in tensors.items()))
    return quantized


def _coverage(name: str, shape: tuple[int, ...], scheme: Scheme | None) -> Coverage:
    if scheme is None:
        return Coverage(
            tensor=name, shape=shape, bits=32, group=None, size_bytes=4 * math.prod(shape))
    return Coverage(tensor=name, shape=shape, bits=scheme.bits, group=scheme.group,
                    size_bytes=scheme.size_bytes(shape[0], shape[1]))


def _plainly(
    source: Checkpoint, recipe: Recipe, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of `source` rounded by itself."""
    names = list(expected_tensors(untied(source.metadata.config)))
    for done, name in enumerate(names):
        progress("quantize", done, len(names), name)
        yield from stored_tensors(name, read_plain(source, name).float(), recipe.scheme_of(name))
    progress("quantize", len(names), len(names))


def _write(
    tensors: Iterator[tuple[str, torch.Tensor]], source: Checkpoint, out: Path, recipe: Recipe,
    parent: str, *, replace: bool,
) -> None:
    """Write the quantized `tensors` of `source`; `parent` is what the checkpoint was made from."""
    config = untied(source.metadata.config)
    with CheckpointWriter(
        out, metadata=changed(source.metadata, config=config, recipe=recipe.name, parent=parent),
        tensors=plan(config, recipe.name), tokenizer=source.tokenizer_path,
        template=source.template_path, replace=replace,
    ) as writer:
        for name, value in tensors:
            writer.add(name, value)
