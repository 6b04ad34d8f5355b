"""4 bits without training: each weight rounded for what its layer reads and has to give.

Layer by layer, on calibration texts. Every matrix reads what the layers rounded before it give, and
is rounded so that its output stays near that of the unrounded model: first the weights are moved to
undo the drift of their inputs (GPTAQ, arXiv 2504.02692), then rounded together (`columns`).
Rotations (`rotate`) go before, and the channels of the feed-forward layer share what stands out
between its weights and its activations (SmoothQuant, arXiv 2211.10438). Memory is that of a layer
and of the texts' hidden states.

What 4 bits still cost is for the most part that of `mlp.down`: on SmolLM2-135M a layer's own error
is 6 % smaller without its rounding, and at most 0.8 % without that of any other matrix.

Shapes: B texts, T positions, D hidden size, M = B x T rows, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.distill.parallel import read_plain
from cloister.errors import NonFiniteTensor
from cloister.model.cache import KVCache
from cloister.model.checkpoint import expected_tensors
from cloister.model.device import device
from cloister.model.transformer import Block, Decoder
from cloister.progress import silent
from cloister.quantize.columns import Moments, damped, improve, round_columns, search_scales
from cloister.quantize.qat import untied
from cloister.quantize.rotate import Rotation, can_rotate
from cloister.quantize.rounding import quantize_weight, stored_tensors
from cloister_kernels.reference import LEAST_SCALE, dequantize, fake_quantize_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cloister.model.checkpoint import Checkpoint
    from cloister.model.recipe import Recipe, Scheme
    from cloister.progress import Progress

    Hook = Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor | None]

__all__ = ["Calibration", "Inputs", "LayerError", "rounded", "smooth"]

LARGEST = 4.0  # square of a row of inputs, against the median
DRIFT_DAMPING = 0.05  # of the mean of the moments' diagonal, added to it where weights are moved
BEYOND = 1e16  # of inputs and outputs: float32 does not hold the sums of their squares
ROWS = 1024  # at a time where that keeps them in the processor's cache
SMOOTHING = 0.3  # exponent of the activations' range, against 0.7 of the weights'
# The inputs that matrices share, in the order in which a layer reads them.
_STAGES = (
    ("attn.qkv", ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v")), ("attn.o", ("attn.o",)),
    ("mlp", ("mlp.gate", "mlp.up")), ("mlp.down", ("mlp.down",)),
)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What rounding does to a layer's output, the rounding of all before it included."""

    layer: int
    error: float  # square of the hidden state's, as a share of its own, mean over tokens


class Calibration:
    """The rounding of one checkpoint by what it reads; `errors` grows with every layer."""

    def __init__(self, source: Checkpoint, recipe: Recipe, texts: Sequence[Sequence[int]]) -> None:
        """Calibrate on `texts`, ids; they are cut to the length of the shortest."""
        self._config, self._recipe = untied(source.metadata.config), recipe
        self._name = source.path.name
        length = min(map(len, texts))
        self._tokens_BT = torch.tensor([list(ids[:length]) for ids in texts], device=device())

        def plain(name: str) -> torch.Tensor:
            return read_plain(source, name).to(device(), torch.float32)

        rotates = can_rotate(self._config)
        self.read = Rotation(self._config, plain, device=device()) if rotates else plain
        with torch.device("meta"):
            self._tables = Decoder(self._config)  # of which only the rotary ones are used
        self.errors: list[LayerError] = []

    @torch.no_grad()
    def tensors(self, progress: Progress = silent) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the quantized checkpoint, by name, in its order.

        Raises:
            NonFiniteTensor: what a layer computes, unrounded, is NaN or above BEYOND.
        """
        layers = self._config.shape.layers
        for name in expected_tensors(self._config):
            if not name.startswith("layers."):
                weight = self.read(name)
                stored = dict(stored_tensors(name, weight, self._recipe.scheme_of(name)))
                yield from stored.items()
                if name == "embed.weight":
                    exact_BTD = self._embedded(weight)
                    rounded_BTD = self._embedded(dequantize(*stored.values()))
                continue
            number = int(name.split(".")[1])
            if number == len(self.errors):  # the first of its tensors
                progress("calibrate", number, layers)
                done, exact_BTD, rounded_BTD = self._layer(number, exact_BTD, rounded_BTD)
            for suffix in ("", ".q", ".scale"):
                if (value := done.pop(name + suffix, None)) is not None:
                    yield name + suffix, value
        progress("calibrate", layers, layers)

    def _embedded(self, weight_VD: torch.Tensor) -> torch.Tensor:
        return functional.embedding(self._tokens_BT, weight_VD) * self._config.embedding_scale

    def _layer(
        self, number: int, exact_BTD: torch.Tensor, rounded_BTD: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Round a layer; return its tensors and both paths' outputs."""
        block, done, prefix = self.block(number), dict[str, torch.Tensor](), f"layers.{number}."
        out_BTD, inputs = self.exact(block, number, exact_BTD)
        for x in (out_BTD, *inputs.values()):
            if not torch.linalg.vector_norm(x, ord=torch.inf) < BEYOND:  # a NaN is none
                raise NonFiniteTensor(
                    f"Layer {number} of {self._name} computes NaN or numbers above {BEYOND:g}; "
                    "train or convert it again.")
        smooth(block, inputs)

        def rounds(stage: str, names: Sequence[str]) -> Hook:
            def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
                read_MK = torch.cat([
                    fake_quantize_rows(part) for part in given[0].flatten(0, -2).split(ROWS)])
                reads = Inputs(read_MK, inputs.pop(stage))
                for name in names:
                    module = block.get_submodule(name)
                    assert isinstance(module, nn.Linear)
                    full = f"{prefix}{name}.weight"
                    q, scale = rounded(module.weight, self._recipe.scheme_of(full), reads)
                    done[f"{full}.q"], done[f"{full}.scale"] = q, scale
                    module.weight.data = dequantize(q, scale)
                return read_MK.view_as(given[0])

            return hook

        for stage, names in _STAGES:
            block.get_submodule(stage).register_forward_pre_hook(rounds(stage, names))
        got_BTD = self._run(block, number, rounded_BTD)
        size_BT = out_BTD.square().sum(-1).clamp(min=torch.finfo(out_BTD.dtype).tiny)
        error_BT = (got_BTD - out_BTD).square().sum(-1) / size_BT
        self.errors.append(LayerError(layer=number, error=float(error_BT.mean())))
        for name, parameter in block.named_parameters():
            if self._recipe.scheme_of(prefix + name) is None:
                done[prefix + name] = parameter.data
        return done, out_BTD, got_BTD

    def exact(
        self, block: Block, number: int, x_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what a layer that is not rounded gives, and what each stage of it reads."""
        parts: dict[str, list[torch.Tensor]] = {stage: [] for stage, _ in _STAGES}

        def notes(stage: str) -> Hook:
            return lambda _, given: parts[stage].append(given[0].flatten(0, -2))

        hooks = [
            block.get_submodule(stage).register_forward_pre_hook(notes(stage)) for stage in parts]
        texts = max(1, ROWS // x_BTD.shape[1])
        out_BTD = torch.cat([self._run(block, number, some) for some in x_BTD.split(texts)])
        for hook in hooks:
            hook.remove()
        return out_BTD, {stage: torch.cat(parts.pop(stage)) for stage in list(parts)}

    def block(self, number: int) -> Block:
        """Return a layer with its weights, rotated."""
        with torch.device("meta"):
            block = Block(self._config, number)
        block.load_state_dict(
            {name: self.read(f"layers.{number}.{name}") for name in block.state_dict()},
            assign=True)
        return block.eval().requires_grad_(False)

    def _run(self, block: Block, number: int, x_BTD: torch.Tensor) -> torch.Tensor:
        cos, sin = (each.to(x_BTD) for each in self._tables.cos_sin(number, 0, x_BTD.shape[1]))
        out_BTD: torch.Tensor = block(x_BTD, (cos, sin), KVCache(self._config))
        return out_BTD


class Inputs(Moments):
    """What a matrix reads on the rounded path, and how far that drifted from the exact one."""

    def __init__(self, rounded_MK: torch.Tensor, exact_MK: torch.Tensor) -> None:
        """Take in the inputs of both paths, rows far larger than most scaled down.

        A model's first token may be a thousand times as large as all others (attention sinks,
        arXiv 2309.17453), and would leave no weight to them.
        """
        size_M1 = torch.linalg.vector_norm(rounded_MK, dim=1, keepdim=True).clamp(min=LEAST_SCALE)
        weight_M1 = (LARGEST**0.5 * size_M1.median() / size_M1).clamp(max=1)
        moments_KK = rounded_MK.new_zeros(2 * (rounded_MK.shape[1],))
        self._drift_KK = torch.zeros_like(moments_KK)
        for rounded, exact, weight in zip(
            rounded_MK.split(ROWS), exact_MK.split(ROWS), weight_M1.split(ROWS), strict=True
        ):
            read, drift = rounded * weight, (exact - rounded) * weight
            moments_KK.addmm_(read.T, read)
            self._drift_KK.addmm_(drift.T, read)
        super().__init__(moments_KK)
        self._damped_factor_KK = torch.linalg.cholesky(
            damped(moments_KK, DRIFT_DAMPING).double())

    def moved(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return the weights whose outputs for the drifted inputs are nearest the exact ones."""
        wanted_KN = (weight_NK @ self._drift_KK).T.double()
        moved_KN = torch.cholesky_solve(wanted_KN, self._damped_factor_KK)
        moved_NK: torch.Tensor = weight_NK + moved_KN.T.float()
        return moved_NK


def rounded(
    weight_NK: torch.Tensor, scheme: Scheme | None, inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers int8[N, K] and scales [N, C] of a matrix for what it reads."""
    assert scheme is not None
    weight_NK = inputs.moved(weight_NK)
    if scheme.group is None:
        return quantize_weight(weight_NK, scheme)
    scale_NC = search_scales(weight_NK, inputs.cost_K, scheme.group)
    q_NK = round_columns(weight_NK, scale_NC, inputs)
    q_NK, scale_NC = improve(weight_NK, q_NK, scale_NC, inputs)
    return q_NK.to(torch.int8).contiguous(), scale_NC


def smooth(block: Block, inputs: dict[str, torch.Tensor]) -> None:
    """Give the feed-forward layer's channels a scale between its two matrices, and a better order.

    Those whose weights are about as large stand side by side, since a group shares a scale.
    """
    gate, up, down = block.mlp.gate, block.mlp.up, block.mlp.down
    reach_K = inputs["mlp.down"].abs().amax(0).clamp(min=1e-6) ** SMOOTHING
    factor_K = reach_K / down.weight.abs().amax(0).clamp(min=1e-6) ** (1 - SMOOTHING)
    factor_K /= factor_K.log().mean().exp()
    order_K = (down.weight.abs().amax(0) * factor_K).argsort()
    inputs["mlp.down"] = (inputs["mlp.down"] / factor_K)[:, order_K]
    down.weight.data = (down.weight * factor_K)[:, order_K]
    up.weight.data = (up.weight / factor_K[:, None])[order_K]
    gate.weight.data = gate.weight[order_K]
    if up.bias is not None:
        gate.bias.data, up.bias.data = gate.bias[order_K], (up.bias / factor_K)[order_K]
