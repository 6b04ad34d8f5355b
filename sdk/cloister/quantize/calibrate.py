"""4 bits without training: each weight rounded for what its layer reads and has to give.

Layer by layer, on calibration texts. Every matrix reads what the layers rounded before it give, and
is rounded so that its output stays near that of the unrounded model: first the weights are moved to
undo the drift of their inputs (GPTAQ, arXiv 2504.02692), then rounded column by column, each error
spread over the columns to come (GPTQ, arXiv 2210.17323). A group's scale is the one of least error,
inputs weighted by their mean square. Rotations (`rotate`) go before, and the channels of the
feed-forward layer share what stands out between its weights and its activations (SmoothQuant,
arXiv 2211.10438). Memory is that of a layer and of the texts' hidden states.

Shapes: B texts, T positions, D hidden size, M = B x T rows, N outputs, K inputs, C groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cloister.distill.parallel import read_plain
from cloister.model.cache import KVCache
from cloister.model.checkpoint import expected_tensors
from cloister.model.transformer import Block, Decoder
from cloister.progress import silent
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

__all__ = ["Calibration", "Hessian", "LayerError", "round_columns", "search_scales"]

DAMPING = 0.01  # of the mean of a Hessian's diagonal, added to it
DRIFT_DAMPING = 0.05  # the same, where weights are moved
SMOOTHING = 0.3  # exponent of the activations' range, against 0.7 of the weights'
_FACTORS = [0.5 + 0.025 * step for step in range(29)]  # of the scale by the largest entry
_COLUMNS = 96  # rounded between two updates of all columns to come
# The inputs that matrices share, in the order in which a layer reads them.
_STAGES = (
    ("attn.qkv", ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v")), ("attn.o", ("attn.o",)),
    ("mlp", ("mlp.gate", "mlp.up")), ("mlp.down", ("mlp.down",)),
)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What rounding does to a layer's output, the rounding of all before it included."""

    layer: int
    error: float  # mean square, as a share of what the layer adds to its input


class Calibration:
    """The rounding of one checkpoint by what it reads; `errors` grows with every layer."""

    def __init__(self, source: Checkpoint, recipe: Recipe, texts: Sequence[Sequence[int]]) -> None:
        """Calibrate on `texts`, ids; they are cut to the length of the shortest."""
        self._config, self._recipe = untied(source.metadata.config), recipe
        length = min(map(len, texts))
        self._tokens_BT = torch.tensor([list(ids[:length]) for ids in texts])

        def plain(name: str) -> torch.Tensor:
            return read_plain(source, name).float()

        self._read = Rotation(self._config, plain) if can_rotate(self._config) else plain
        with torch.device("meta"):
            self._tables = Decoder(self._config)  # of which only the rotary ones are used
        self.errors: list[LayerError] = []

    @torch.no_grad()
    def tensors(self, progress: Progress = silent) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the quantized checkpoint, by name, in its order."""
        layers = self._config.shape.layers
        for name in expected_tensors(self._config):
            if not name.startswith("layers."):
                weight = self._read(name)
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
        block, done, prefix = self._block(number), dict[str, torch.Tensor](), f"layers.{number}."
        inputs: dict[str, torch.Tensor] = {}

        def notes(stage: str) -> Hook:
            return lambda _, given: inputs.update({stage: given[0].flatten(0, -2)})

        hooks = [
            block.get_submodule(stage).register_forward_pre_hook(notes(stage))
            for stage, _ in _STAGES
        ]
        out_BTD = self._run(block, number, exact_BTD)
        for hook in hooks:
            hook.remove()
        _smooth(block, inputs)

        def rounds(stage: str, names: Sequence[str]) -> Hook:
            def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
                read_MK = fake_quantize_rows(given[0].flatten(0, -2))
                hessian = Hessian(read_MK, inputs.pop(stage))
                for name in names:
                    module = block.get_submodule(name)
                    assert isinstance(module, nn.Linear)
                    full = f"{prefix}{name}.weight"
                    q, scale = _rounded(module.weight, self._recipe.scheme_of(full), hessian)
                    done[f"{full}.q"], done[f"{full}.scale"] = q, scale
                    module.weight.data = dequantize(q, scale)
                return read_MK.view_as(given[0])

            return hook

        for stage, names in _STAGES:
            block.get_submodule(stage).register_forward_pre_hook(rounds(stage, names))
        got_BTD = self._run(block, number, rounded_BTD)
        added = (out_BTD - exact_BTD).square().mean()
        self.errors.append(LayerError(
            layer=number, error=float((got_BTD - out_BTD).square().mean() / added)))
        for name, parameter in block.named_parameters():
            if self._recipe.scheme_of(prefix + name) is None:
                done[prefix + name] = parameter.data
        return done, out_BTD, got_BTD

    def _block(self, number: int) -> Block:
        with torch.device("meta"):
            block = Block(self._config, number)
        block.load_state_dict(
            {name: self._read(f"layers.{number}.{name}") for name in block.state_dict()},
            assign=True)
        return block.eval()

    def _run(self, block: Block, number: int, x_BTD: torch.Tensor) -> torch.Tensor:
        cos_sin = self._tables.cos_sin(number, 0, x_BTD.shape[1])
        out_BTD: torch.Tensor = block(x_BTD, cos_sin, KVCache(self._config))
        return out_BTD


class Hessian:
    """What a matrix reads: the second moments of its inputs, and how far they drifted."""

    def __init__(self, rounded_MK: torch.Tensor, exact_MK: torch.Tensor) -> None:
        """Take in the inputs of both paths."""
        self._moments_KK = rounded_MK.T @ rounded_MK
        self._drift_KK = (exact_MK - rounded_MK).T @ rounded_MK
        self.importance_K = self._moments_KK.diagonal() / len(rounded_MK)  # mean squares
        inverse_KK = torch.cholesky_inverse(self._damped(DAMPING))
        self.factor_KK = torch.linalg.cholesky(inverse_KK, upper=True).float()
        self._drift_factor_KK = self._damped(DRIFT_DAMPING)

    def moved(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return the weights whose outputs for the drifted inputs are nearest the exact ones."""
        wanted_KN = (weight_NK @ self._drift_KK).T.double()
        moved_KN = torch.cholesky_solve(wanted_KN, self._drift_factor_KK)
        moved_NK: torch.Tensor = weight_NK + moved_KN.T.float()
        return moved_NK

    def _damped(self, share: float) -> torch.Tensor:
        """Return the lower Cholesky factor of the damped moments, float64[K, K]."""
        moments_KK = self._moments_KK.double()
        diagonal = moments_KK.diagonal()
        diagonal += share * diagonal.mean().clamp(min=LEAST_SCALE)
        factor_KK: torch.Tensor = torch.linalg.cholesky(moments_KK)
        return factor_KK


def search_scales(
    weight_NK: torch.Tensor, importance_K: torch.Tensor, group: int
) -> torch.Tensor:
    """Return the scale of least weighted square error of each group, bfloat16[N, C]."""
    groups_NCG = weight_NK.unflatten(1, (-1, group))
    importance_CG = importance_K.view(-1, group)
    largest_NC: torch.Tensor = groups_NCG.abs().amax(-1) / 7.5
    best_NC = torch.full_like(largest_NC, torch.inf)
    scale_NC = largest_NC
    for factor in _FACTORS:
        tried_NC = (largest_NC * factor).clamp(min=LEAST_SCALE).bfloat16().float()
        rounded_NCG = (groups_NCG / tried_NC[..., None]).round_().clamp_(-8, 7)
        rounded_NCG *= tried_NC[..., None]
        error_NC = (rounded_NCG.sub_(groups_NCG).square_() * importance_CG).sum(-1)
        better_NC = error_NC < best_NC
        best_NC = torch.where(better_NC, error_NC, best_NC)
        scale_NC = torch.where(better_NC, tried_NC, scale_NC)
    return scale_NC.bfloat16()


def round_columns(
    weight_NK: torch.Tensor, scale_NC: torch.Tensor, factor_KK: torch.Tensor
) -> torch.Tensor:
    """Round column by column, each error spread over those to come, int8[N, K].

    `factor_KK` is the upper Cholesky factor of the inverse Hessian.
    """
    left_NK, rows, inputs = weight_NK.clone(), *weight_NK.shape
    scale_NK = scale_NC.float().repeat_interleave(inputs // scale_NC.shape[1], 1)
    q_NK = torch.empty_like(left_NK)
    for begin in range(0, inputs, _COLUMNS):
        end = min(begin + _COLUMNS, inputs)
        columns = left_NK[:, begin:end].T.contiguous()  # a column's entries side by side
        factor, errors = factor_KK[begin:end, begin:end], torch.empty(end - begin, rows)
        for at in range(end - begin):
            scale_N = scale_NK[:, begin + at]
            q_N = (columns[at] / scale_N).round_().clamp_(-8, 7)
            errors[at] = (columns[at] - q_N * scale_N) / factor[at, at]
            columns[at + 1:].addr_(factor[at, at + 1:], errors[at], alpha=-1)
            q_NK[:, begin + at] = q_N
        left_NK[:, end:] -= errors.T @ factor_KK[begin:end, end:]
    return q_NK.to(torch.int8)


def _rounded(
    weight_NK: torch.Tensor, scheme: Scheme | None, hessian: Hessian
) -> tuple[torch.Tensor, torch.Tensor]:
    assert scheme is not None
    weight_NK = hessian.moved(weight_NK)
    if scheme.group is None:
        return quantize_weight(weight_NK, scheme)
    scale_NC = search_scales(weight_NK, hessian.importance_K, scheme.group)
    return round_columns(weight_NK, scale_NC, hessian.factor_KK), scale_NC


def _smooth(block: Block, inputs: dict[str, torch.Tensor]) -> None:
    """Give the feed-forward layer's channels a scale between its two matrices."""
    up, down = block.mlp.up, block.mlp.down
    reach_K = inputs["mlp.down"].abs().amax(0).clamp(min=1e-6) ** SMOOTHING
    factor_K = reach_K / down.weight.abs().amax(0).clamp(min=1e-6) ** (1 - SMOOTHING)
    factor_K /= factor_K.log().mean().exp()
    inputs["mlp.down"] /= factor_K
    up.weight.data /= factor_K[:, None]
    if up.bias is not None:
        up.bias.data /= factor_K
    down.weight.data *= factor_K
