"""Post-training quantization, one matrix at a time, from a checkpoint to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from cloister.errors import GroupSizeError, QuantizationError
from cloister.model.checkpoint import Checkpoint, check_finite, expected_tensors, plan
from cloister.model.quantized import scale_dtype
from cloister.model.writer import CheckpointWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cloister.model.recipe import Recipe, Scheme

__all__ = ["Coverage", "Report", "check_groups", "quantize", "quantize_weight"]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What became of one tensor."""

    tensor: str
    shape: tuple[int, ...]
    bits: int  # an entry, scales apart; 32 where it was left alone
    group: int | None
    size_bytes: int  # scales included


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every tensor; nothing is left out."""

    recipe: str
    rows: tuple[Coverage, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights, scales included."""
        return sum(row.size_bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Entries of all weights; embedding and head count apart."""
        return sum(torch.Size(row.shape).numel() for row in self.rows)

    @property
    def bits_per_parameter(self) -> float:
        """Mean over all weights, scales included."""
        return 8 * self.size_bytes / self.parameters


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers int8[N, K] and scales [N, C] of `weight`, float32[N, K].

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
    source: Checkpoint,
    out: Path,
    recipe: Recipe,
    *,
    parent: str | None = None,
    replace_existing: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Report:
    """Write `source` quantized to the checkpoint `out`.

    `parent` is the identity of what it was made from, where that is not `source` itself.
    Memory stays near one float32 matrix above what the source maps. `progress` is called with
    tensors done, tensors in all, and the next one's name.

    Raises:
        QuantizationError: the source is quantized already.
        GroupSizeError: a group does not divide a layer's inputs; nothing was written.
        NonFiniteTensor: a weight is NaN or infinite; nothing was written.
    """
    metadata = source.metadata
    if metadata.recipe is not None:
        raise QuantizationError(
            f"Checkpoint {source.path.name} is quantized already ({metadata.recipe}); "
            "start from the checkpoint it was made from."
        )
    config = replace(metadata.config, shape=replace(metadata.config.shape, tied=False))
    plain = expected_tensors(config)
    check_groups(plain, recipe)
    rows = []
    with CheckpointWriter(
        out,
        metadata=replace(
            metadata, config=config, recipe=recipe.name, parent=parent or source.identity
        ),
        tensors=plan(config, recipe.name),
        tokenizer=source.tokenizer_path,
        template=source.template_path,
        replace=replace_existing,
    ) as writer:
        for done, (name, shape) in enumerate(plain.items()):
            progress(done, len(plain), name)
            tied_head = metadata.config.shape.tied and name == "head.weight"
            weight = source.tensor("embed.weight" if tied_head else name).float()
            check_finite(weight, name, source.path)
            scheme = recipe.scheme_of(name)
            if scheme is None:
                writer.add(name, weight)
                size_bytes = 4 * weight.numel()
            else:
                q, scale = quantize_weight(weight, scheme)
                writer.add(f"{name}.q", q)
                writer.add(f"{name}.scale", scale)
                size_bytes = scheme.size_bytes(*weight.shape)
            rows.append(Coverage(
                tensor=name, shape=tuple(shape), bits=scheme.bits if scheme else 32,
                group=scheme.group if scheme else None, size_bytes=size_bytes,
            ))
        progress(len(plain), len(plain), "")
    return Report(recipe=recipe.name, rows=tuple(rows))


def check_groups(tensors: dict[str, tuple[int, ...]], recipe: Recipe) -> None:
    """Nothing, where every group of `recipe` divides its layer's inputs.

    Raises:
        GroupSizeError: one does not.
    """
    for name, shape in tensors.items():
        scheme = recipe.scheme_of(name)
        if scheme is not None and scheme.group is not None and shape[1] % scheme.group:
            raise GroupSizeError(
                f"Layer {name.removesuffix('.weight')} has {shape[1]} inputs, which groups of "
                f"{scheme.group} do not divide; choose another recipe."
            )
