"""The rounding of what reads pictures and recordings: encoder and projector, to 4 or 8 bits.

Linear layers are rounded as a decoder's are (`calibrate`): by themselves, or for what they read of
media. Convolutions, norms and positions stay as they are, in Whisper base 8 % of the weights.

On speech, the vectors of Whisper base are 6 % off in 8 bits, and 25 % in 4 bits in groups of 32,
where each layer is rounded by itself, and 5 % and 13 % where it is rounded for what it reads.

Shapes: B pictures or pieces, N positions, D hidden size, M rows, K inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from cloister import media
from cloister.distill.examples import examples_of
from cloister.errors import DataError, QuantizationError
from cloister.example import MEDIA
from cloister.model import sense_file
from cloister.model.encoder import EncoderBlock
from cloister.model.projector import TokenProjector
from cloister.model.recipe import Recipe
from cloister.model.sense import Sense, linears, scheme_of
from cloister.model.sense_file import SenseKind
from cloister.model.senses import tensor
from cloister.parts import one_by_one
from cloister.progress import silent
from cloister.quantize.calibrate import ROWS, Inputs, rounded
from cloister.quantize.rounding import quantize_weight
from cloister_kernels.reference import dequantize, fake_quantize_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloister.example import Example
    from cloister.model.checkpoint import Checkpoint
    from cloister.model.sense import SenseConfig
    from cloister.model.sense_file import SenseFile
    from cloister.progress import Progress

    Named = tuple[str, torch.Tensor]
    Quantized = dict[str, tuple[torch.Tensor, torch.Tensor]]  # integers and scales by layer

__all__ = ["SENSE_RECIPE", "SenseOptions", "SenseReport", "media_of", "quantize_sense",
           "relative_error"]

SENSE_RECIPE = "8da8w"


@dataclass(frozen=True, kw_only=True)
class SenseOptions:
    """How what reads pictures and recordings is quantized: as it is, or for what it reads."""

    recipe: str = SENSE_RECIPE
    media: str | Path | Sequence[Example] | None = None  # examples that name some
"""The default: in 4 bits an encoder's vectors are two to four times as far off."""

SMOOTHING = 0.5  # exponent of the inputs' range, as of the weights'
MOST = 32  # pictures or recordings that are calibrated and measured on
_LEAST = 1e-6
_MEASURED = 4  # of so many media one is measured on and not calibrated on


@dataclass(frozen=True, kw_only=True)
class SenseReport:
    """The quantization of one sense."""

    sense: str  # vision or audio
    recipe: str
    size_bytes: int
    calibrated: int  # media that its layers were rounded for
    measured: int  # media that `error` is measured on; 0: none were given
    error: float | None  # of the vectors, relative to those that are not quantized


def quantize_sense(
    file: SenseFile, out: Path, recipe: Recipe | str = SENSE_RECIPE, *,
    given: Sequence[torch.Tensor] = (), name: str = "sense", progress: Progress = silent
) -> SenseReport:
    """Write the sense in `file` to `out`, quantized, for what it reads of `given` if there is any.

    That is what `Sense` takes: uint8[B, 3, R, W] or float32[1, 1, N] each. Of four or more, each
    fourth is kept to measure the error on; of fewer, it is measured on the same.

    Raises:
        QuantizationError: it is quantized already.
        SettingError: no recipe of that name.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    if file.config.recipe is not None:
        raise QuantizationError(
            f"{file.path.name} is quantized already; use the one that it was made of.")
    few = len(given) < _MEASURED
    read = [each for at, each in enumerate(given) if few or at % _MEASURED != _MEASURED - 1]
    measured = list(given) if few else list(given[_MEASURED - 1::_MEASURED])
    sense = file.load()
    done = (
        _calibrated(sense, recipe, read, progress) if read else _by_themselves(sense, recipe))
    config = replace(file.config, recipe=recipe.name)
    sense_file.write(out, config, _stored(sense, config, done))
    made = sense_file.SenseFile.open(out)
    return SenseReport(
        sense=name, recipe=recipe.name, size_bytes=out.stat().st_size, calibrated=len(read),
        measured=len(measured),
        error=relative_error(made.load(), file.load(), measured) if measured else None)


def media_of(
    source: Checkpoint, data: str | Path | Sequence[Example], *, progress: Progress = silent
) -> dict[SenseKind, list[torch.Tensor]]:
    """Return pictures and recordings of examples as the senses of `source` take them.

    At most MOST of each, evenly over all.

    Raises:
        DataError: the data cannot be used, or names none that the checkpoint takes.
        MediaUnreadable, MediaTooLarge: see `cloister.media.read`.
    """
    formats, found = source.metadata.media, dict[SenseKind, list[torch.Tensor]]()
    examples = examples_of(data, tolerate=0.05)
    for sense, kind in ((SenseKind.VISION, "image"), (SenseKind.AUDIO, "audio")):
        files = [path for each in examples for named, path in each.files if named == kind]
        if formats is None or sense not in source.senses or not files:
            continue
        some = files[::-(-len(files) // MOST)]
        for done, path in enumerate(some):
            progress(f"read {kind}s", done, len(some))
            part = media.read(MEDIA[kind].open(path), formats)
            found.setdefault(sense, []).extend(
                tensor(each, formats.of(each)) for each in one_by_one([part]))
    if not found:
        raise DataError(
            "The data name no picture or recording that the checkpoint takes; name others, or "
            "leave them out.")
    return found


@torch.no_grad()
def relative_error(sense: Sense, plain: Sense, media: Sequence[torch.Tensor]) -> float:
    """Return how far the vectors of `sense` are from those of `plain`, relative to their norm.

    Of a projector to tokens, which gives one vector or another, the encoder's own.
    """
    off, size = 0.0, 0.0
    for each in media:
        got, wanted = _vectors(sense, each), _vectors(plain, each)
        off += float(torch.linalg.vector_norm(got - wanted)) ** 2
        size += float(torch.linalg.vector_norm(wanted)) ** 2
    return math.sqrt(off / size)


def _vectors(sense: Sense, medium: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = sense.encoder(sense.read(medium)) if isinstance(
        sense.projector, TokenProjector) else sense(medium)
    return out


def _by_themselves(sense: Sense, recipe: Recipe) -> Quantized:
    return {
        name: quantize_weight(linear.weight.detach(), scheme_of(recipe, name, linear.in_features))
        for name, linear in linears(sense)}


def _stored(sense: Sense, config: SenseConfig, done: Quantized) -> Iterator[Named]:
    """Yield the tensors of the file, in the order of its plan."""
    values = sense.state_dict()
    for name, (q, scale) in done.items():
        values |= {f"{name}.weight.q": q, f"{name}.weight.scale": scale}
    for name in sense_file.plan(config):
        yield name, values[name]


@torch.no_grad()
def _calibrated(
    sense: Sense, recipe: Recipe, media: Sequence[torch.Tensor], progress: Progress
) -> Quantized:
    """Round layer by layer for what is read of `media`; the weights of `sense` become those."""
    encoder = sense.encoder
    done: Quantized = {}
    exact = path = torch.cat([sense.read(each) for each in _of_one_length(media)])
    steps: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
        ("encoder.stem", encoder.embed),
        *((f"encoder.layers.{at}", layer) for at, layer in enumerate(encoder.layers)),
        ("projector", lambda x_BND: _projected(sense.projector, encoder.norm(x_BND))),
    ]
    for at, (prefix, step) in enumerate(steps):
        progress("calibrate encoder", at, len(steps))
        own = {name: each for name, each in linears(sense) if name.startswith(f"{prefix}.")}
        exact, inputs = _noted(step, exact, own)
        if isinstance(step, EncoderBlock):
            smooth(step, prefix, inputs)
        path = _rounding(step, path, own, inputs, recipe, done)
    progress("calibrate encoder", len(steps), len(steps))
    return done


def smooth(block: EncoderBlock, prefix: str, inputs: dict[str, torch.Tensor]) -> None:
    """Move what stands out of a layer's inputs into its weights (SmoothQuant, arXiv 2211.10438).

    The norms and the values take the scales, so that the block computes what it did. Of the inputs
    of `down`, which are an activation's outputs, nothing can.
    """
    moved: list[tuple[tuple[str, ...], nn.LayerNorm | nn.Linear]] = [
        (("attn.q", "attn.k", "attn.v"), block.attn_norm), (("attn.o",), block.attn.v),
        (("mlp.up",), block.mlp_norm)]
    if block.convolves:
        moved.append((("convolution.gate",), block.convolution_norm))
    for names, before in moved:
        layers = [each for name, each in linears(block) if name in names]
        reach_K = inputs[f"{prefix}.{names[0]}"].abs().amax(0).clamp(min=_LEAST) ** SMOOTHING
        largest_K = torch.stack([
            each.weight.detach().abs().amax(0) for each in layers]).amax(0).clamp(min=_LEAST)
        factor_K = reach_K / largest_K ** (1 - SMOOTHING)
        factor_K /= factor_K.log().mean().exp()
        scale = factor_K if before.weight.dim() == 1 else factor_K[:, None]
        before.weight.data, before.bias.data = before.weight / scale, before.bias / factor_K
        for name, each in zip(names, layers, strict=True):
            each.weight.data = each.weight * factor_K
            inputs[f"{prefix}.{name}"] = inputs[f"{prefix}.{name}"] / factor_K


def _of_one_length(media: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return recordings filled up with silence to the longest; pictures are of one size."""
    longest = max(each.shape[-1] for each in media)
    return [nn.functional.pad(each, (0, longest - each.shape[-1])) for each in media]


def _projected(projector: nn.Module, x_BND: torch.Tensor) -> torch.Tensor:
    """Run every linear layer of a projector, whatever it would choose."""
    if not isinstance(projector, TokenProjector):
        out: torch.Tensor = projector(x_BND)
        return out
    x_BND, _ = projector.found(x_BND)
    out = projector.correction(x_BND)
    return out


def _noted(
    step: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, own: dict[str, nn.Linear]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what a step gives, and what each of its layers reads, [M, K]."""
    read: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, given: read.__setitem__(name, given[0].flatten(0, -2))

    hooks = [each.register_forward_pre_hook(note(name)) for name, each in own.items()]
    out = step(x)
    for hook in hooks:
        hook.remove()
    return out, read


def _rounding(
    step: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, own: dict[str, nn.Linear],
    exact: dict[str, torch.Tensor], recipe: Recipe, done: Quantized
) -> torch.Tensor:
    """Return what a step gives of rounded inputs, each layer rounded before it is run."""
    known: list[tuple[torch.Tensor, Inputs]] = []  # of the tensor that queries and keys share

    def round_(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]:
        def hook(linear: nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
            assert isinstance(linear, nn.Linear)
            weight, scheme = linear.weight.detach(), scheme_of(recipe, name, linear.in_features)
            read_MK = torch.cat([
                fake_quantize_rows(part) for part in given[0].flatten(0, -2).split(ROWS)])
            if scheme.group is None:
                done[name] = quantize_weight(weight, scheme)
            else:
                if not known or known[-1][0] is not given[0]:
                    known[:] = [(given[0], Inputs(read_MK, exact[name]))]
                done[name] = rounded(weight, scheme, known[-1][1])
            linear.weight.data = dequantize(*done[name])
            return read_MK.view_as(given[0])

        return hook

    hooks = [each.register_forward_pre_hook(round_(name)) for name, each in own.items()]
    out = step(x)
    for hook in hooks:
        hook.remove()
    return out
