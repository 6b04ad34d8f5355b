"""Quantization from a checkpoint to a checkpoint, one matrix at a time."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from cloister.distill.parallel import Parallel, read_plain
from cloister.distill.run import check_source, examples_of, run_folder
from cloister.model.checkpoint import Checkpoint, expected_tensors, plan
from cloister.model.quantized import scale_dtype
from cloister.model.recipe import DEFAULT_RECIPE, Recipe
from cloister.model.writer import CheckpointWriter
from cloister.progress import silent
from cloister.quantize.qat import check_groups, untied
from cloister.quantize.train import QatSettings, train_quantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.corpus import Example
    from cloister.distill.loop import Run
    from cloister.model.recipe import Scheme
    from cloister.progress import Progress

__all__ = ["Coverage", "QuantizeReport", "quantize", "quantize_weight"]


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
                "loss": self.run.losses[-1],
            }
        return record


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers int8[N, K] and scales [N, C] of `weight`, float32[N, K].

    Symmetric, the scale set by the largest entry of a group (torchao's affine choice, which
    quantization-aware training uses too).
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"),
        weight_granularity=PerAxis(0) if scheme.group is None else PerGroup(scheme.group),
        weight_scale_dtype=scale_dtype(scheme),
    ))
    quantized: Any = layer.weight  # torchao's tensor
    return quantized.qdata, quantized.scale


def quantize(
    source: Checkpoint | str | Path,
    out: str | Path,
    recipe: Recipe | str = DEFAULT_RECIPE,
    *,
    data: str | Path | Sequence[Example] | None = None,
    settings: QatSettings | None = None,
    replace: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Write `source` quantized to the checkpoint `out`, whose `report` is a `QuantizeReport`.

    With `data`, examples or files of them (see `cloister.corpus`), after quantization-aware
    training on it by `settings`, which resumes when a killed run is repeated; without, memory
    stays near one float32 matrix above what the source maps.

    Raises:
        QuantizationError: the source is quantized already.
        SettingError: no recipe of that name.
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
    parallel, plain, run = Parallel(), source, None
    progress = progress if parallel.rank == 0 else silent
    if data is not None:
        settings = settings or QatSettings()
        plain, run = train_quantized(
            source, run_folder(out), recipe, examples_of(data, settings.tolerate), settings,
            progress=progress)
    if parallel.rank == 0:
        _write(plain, out, recipe, source.identity, replace=replace, progress=progress)
        if plain is not source:
            shutil.rmtree(plain.path)
    parallel.wait()
    quantized = Checkpoint.open(out)
    quantized.report = QuantizeReport(
        identity=quantized.identity, recipe=recipe.name, run=run, rows=tuple(
            _coverage(name, shape, recipe.scheme_of(name)) for name, shape in tensors.items()))
    return quantized


def _coverage(name: str, shape: tuple[int, ...], scheme: Scheme | None) -> Coverage:
    if scheme is None:
        return Coverage(
            tensor=name, shape=shape, bits=32, group=None, size_bytes=4 * math.prod(shape))
    return Coverage(tensor=name, shape=shape, bits=scheme.bits, group=scheme.group,
                    size_bytes=scheme.size_bytes(shape[0], shape[1]))


def _write(
    source: Checkpoint, out: Path, recipe: Recipe, parent: str, *, replace: bool, progress: Progress
) -> None:
    """Write each tensor of `source` quantized; `parent` is what the checkpoint was made from."""
    config = untied(source.metadata.config)
    names = list(expected_tensors(config))
    with CheckpointWriter(
        out, metadata=changed(source.metadata, config=config, recipe=recipe.name, parent=parent),
        tensors=plan(config, recipe.name), tokenizer=source.tokenizer_path,
        template=source.template_path, replace=replace,
    ) as writer:
        for done, name in enumerate(names):
            progress("quantize", done, len(names), name)
            weight, scheme = read_plain(source, name).float(), recipe.scheme_of(name)
            if scheme is None:
                writer.add(name, weight)
            else:
                q, scale = quantize_weight(weight, scheme)
                writer.add(f"{name}.q", q)
                writer.add(f"{name}.scale", scale)
    progress("quantize", len(names), len(names))
