"""XNNPACK: a sense's matrices, convolutions and norms become delegates, attention is a kernel.

A convolution is a matrix on windows of its input, as the decoder's linear layers are, and so is the
transform of a spectrum: what is left outside is the gathering of windows, which copies.

Shapes: B batch, T rows, N positions, D hidden size, H heads, K head size, C channels, R rows of the
encoder's input, W its columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from cloister.model.encoder import Stem
from cloister.model.front import Mel
from cloister.model.projector import ProjectorKind, TokenProjector
from cloister.model.quantized import QuantizedLinear
from cloister.model.sense import Sense
from cloister.model.transformer import RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.export.backends.xnnpack_graph import Delegates, Subgraph, Value
    from cloister.export.graph import Delegated

__all__ = ["delegate_sense"]


def delegate_sense(
    delegates: Delegates, sense: Sense, name: str, rows: int,
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> Sense:
    """Return a sense that calls delegates where `sense` computes; their names begin with `name`.

    `rows` is the most of any delegate's; `embed` is the decoder's embedding.
    """
    with torch.device("meta"):  # every parameter is replaced
        twin: Any = Sense(sense.config)
    build = _Builder(delegates, name, rows)
    encoder: Any = sense.encoder
    if isinstance(sense.front, Mel):
        twin.front = _Mel(build, sense.front)
    twin.encoder.stem = _STEMS[encoder.shape.stem](build, encoder.stem)
    twin.encoder.positions = encoder.positions
    tanh = encoder.shape.activation == "gelu_tanh"
    for number, layer in enumerate(encoder.layers):
        _delegate_layer(build, layer, twin.encoder.layers[number], f"layers.{number}", tanh=tanh)
    stacked = sense.config.projector is not None and (
        sense.config.projector.kind is ProjectorKind.STACK)
    if stacked:
        twin.projector = _Stack(build, sense.projector)
    spelled = sense.config.projector is not None and bool(sense.config.projector.alphabet)
    if spelled:
        _delegate_spelling(build, sense.projector, twin.projector)
    for part, module in sense.named_modules():
        if part == "encoder.norm" or (
                part.startswith("projector.") and not stacked and ".layers." not in part):
            if isinstance(module, nn.Linear | QuantizedLinear):
                twin.set_submodule(part, build.linear(part, module))
            elif isinstance(module, nn.LayerNorm | RMSNorm):
                twin.set_submodule(part, build.norm(part, module))
    if isinstance(twin.projector, TokenProjector):
        twin.projector.read_with(embed)
    return twin.eval().requires_grad_(False)  # type: ignore[no-any-return]


class _Rows(nn.Module):
    """A delegate on rows of any leading shape."""

    def __init__(self, delegate: Delegated) -> None:
        super().__init__()
        self.delegate = delegate

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if x.dim() == 3 and x.shape[0] == 1:
            return self.delegate(x)  # type: ignore[no-any-return]
        out = self.delegate(x.reshape(1, -1, x.shape[-1]))
        if isinstance(out, torch.Tensor):
            return out.reshape(*x.shape[:-1], out.shape[-1])
        return [each.reshape(*x.shape[:-1], each.shape[-1]) for each in out]


class _Builder:
    """Makes delegates of modules, by the name of the part."""

    def __init__(self, delegates: Delegates, prefix: str, rows: int) -> None:
        self.delegates, self.prefix, self.rows = delegates, prefix, rows

    def __call__(
        self, part: str, size: int, build: Callable[[Subgraph, Value], list[Value]]
    ) -> _Rows:
        return _Rows(self.delegates(f"{self.prefix}.{part}", size, build, self.rows))

    def linear(self, part: str, module: nn.Linear | QuantizedLinear) -> _Rows:
        return self(part, module.in_features, lambda g, x: [self.multiplied(g, x, part, module)])

    def norm(self, part: str, module: nn.LayerNorm | RMSNorm) -> _Rows:
        return self(part, module.weight.numel(), lambda g, x: [self.normed(g, x, part, module)])

    def dense(
        self, part: str, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool
    ) -> _Rows:
        def build(g: Subgraph, x: Value) -> list[Value]:
            x = g.dense(x, f"{self.prefix}.{part}", weight, bias)
            return [g.gelu(x) if gelu else x]

        return self(part, weight.shape[1], build)

    def multiplied(
        self, g: Subgraph, x: Value, part: str, module: nn.Linear | QuantizedLinear,
        rounded: Value | None = None,
    ) -> Value:
        name = f"{self.prefix}.{part}"
        if isinstance(module, QuantizedLinear):
            return g.linear(g.rounded(x) if rounded is None else rounded, name, module)
        return g.dense(x, name, module.weight, module.bias)

    def normed(
        self, g: Subgraph, x: Value, part: str, module: nn.LayerNorm | RMSNorm
    ) -> Value:
        name = f"{self.prefix}.{part}.weight"
        if isinstance(module, RMSNorm):
            weight = module.weight + 1.0 if module.offset else module.weight
            return g.norm(x, name, weight, module.eps)
        return g.layer_norm(x, name, module.weight, module.bias, module.eps)


def _delegate_layer(build: _Builder, layer: Any, twin: Any, name: str, *, tanh: bool) -> None:
    """Replace in `twin` what `layer` computes outside attention by three delegates."""
    attn, mlp, part = layer.attn, layer.mlp, f"encoder.{name}"

    def qkv(g: Subgraph, x: Value) -> list[Value]:
        x = build.normed(g, x, f"{part}.attn_norm", layer.attn_norm)
        rounded = g.rounded(x) if isinstance(attn.q, QuantizedLinear) else None
        return [build.multiplied(g, x, f"{part}.attn.{each}", getattr(attn, each), rounded)
                for each in "qkv"]

    def feed_forward(g: Subgraph, x: Value) -> list[Value]:
        x = build.normed(g, x, f"{part}.mlp_norm", layer.mlp_norm)
        x = build.multiplied(g, x, f"{part}.mlp.up", mlp.up)
        x = g.gelu_tanh(x) if tanh else g.gelu(x)
        return [build.multiplied(g, x, f"{part}.mlp.down", mlp.down)]

    size = layer.attn_norm.weight.numel()
    twin.attn = _Attention(
        build(f"{part}.attn.qkv", size, qkv), build.linear(f"{part}.attn.o", attn.o),
        attn.head_size)
    if layer.convolves:
        twin.convolution = _Convolution(build, layer, part)
        twin.convolution_norm = nn.Identity()
    twin.mlp = build(f"{part}.mlp", size, feed_forward)
    twin.attn_norm = twin.mlp_norm = nn.Identity()


def _delegate_spelling(build: _Builder, projector: Any, twin: Any) -> None:
    """Replace in `twin` each layer of the spelling by a delegate and what is added to it."""
    twin.spelling.letters = projector.spelling.letters
    twin.spelling.pieces_JV = projector.spelling.pieces_JV
    for number, layer in enumerate(projector.spelling.layers):
        twin.spelling.layers[number] = _SpellingBlock(build, layer, number)


class _SpellingBlock(nn.Module):
    """See `cloister.model.spelling.SpellingBlock`."""

    def __init__(self, build: _Builder, layer: Any, number: int) -> None:
        super().__init__()
        part = f"projector.spelling.layers.{number}"

        def whole(g: Subgraph, x: Value) -> list[Value]:
            x = g.depthwise(
                x, f"{build.prefix}.{part}.depth", layer.depth.weight, layer.depth.bias)
            x = build.normed(g, x, f"{part}.norm", layer.norm)
            x = g.gelu(build.multiplied(g, x, f"{part}.up", layer.up))
            return [build.multiplied(g, x, f"{part}.down", layer.down)]

        self.whole = build.delegates(
            f"{build.prefix}.{part}", layer.norm.weight.numel(), whole, build.rows, (1, 1))

    def forward(self, x_BKD: torch.Tensor) -> torch.Tensor:
        out_B1KD: torch.Tensor = self.whole(x_BKD.unsqueeze(1))
        return x_BKD + out_B1KD.squeeze(1)


class _Attention(nn.Module):
    def __init__(self, qkv: _Rows, o: _Rows, head_size: int) -> None:
        super().__init__()
        self.qkv, self.o, self.head_size = qkv, o, head_size

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        q_BNHK, k_BNHK, v_BNHK = (
            each.unflatten(-1, (-1, self.head_size)) for each in self.qkv(x_BND))
        out_BNHK = torch.ops.llama.custom_sdpa(
            q_BNHK, k_BNHK, v_BNHK, 0, None, 0.0, False, self.head_size**-0.5)
        out_BND: torch.Tensor = self.o(out_BNHK.flatten(2))
        return out_BND


class _Convolution(nn.Module):
    """See `cloister.model.encoder.EncoderBlock`: the gated convolution, behind its norm."""

    def __init__(self, build: _Builder, layer: Any, part: str) -> None:
        super().__init__()
        own, size, name = layer.convolution, layer.convolution_norm.weight.numel(), "convolution"

        def gate(g: Subgraph, x: Value) -> list[Value]:
            x = build.normed(g, x, f"{part}.convolution_norm", layer.convolution_norm)
            return [build.multiplied(g, x, f"{part}.{name}.gate", own.gate)]

        def depth(g: Subgraph, x: Value) -> list[Value]:
            at = f"{build.prefix}.{part}.{name}.depth"
            x = g.silu(g.depthwise(x, at, own.depth.weight, own.depth.bias))
            return [build.multiplied(g, x, f"{part}.{name}.down", own.down)]

        self.gate = build(f"{part}.{name}.gate", size, gate)
        self.depth = build.delegates(
            f"{build.prefix}.{part}.{name}", size, depth, build.rows, (1, 1))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        x_BND = functional.glu(self.gate(x_BND), dim=-1)
        out_B1ND: torch.Tensor = self.depth(x_BND.unsqueeze(1))
        return out_B1ND.squeeze(1)


class _Stack(nn.Module):
    """See `cloister.model.projector`: both matrices, and what is between them."""

    def __init__(self, build: _Builder, projector: Any) -> None:
        super().__init__()
        self.factor = projector.shape.factor

        def both(g: Subgraph, x: Value) -> list[Value]:
            x = g.gelu(build.multiplied(g, x, "projector.up", projector.up))
            return [build.multiplied(g, x, "projector.down", projector.down)]

        self.both = build("projector", projector.up.in_features, both)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        out_BME: Any = self.both(x_BND.unflatten(1, (-1, self.factor)).flatten(2))
        return out_BME  # type: ignore[no-any-return]


def _windows(x_BTC: torch.Tensor, size: int, step: int) -> torch.Tensor:
    """Return `size` rows side by side, each `step` behind the last: [B, T', size * C]."""
    unit = math.gcd(size, step)  # rows that are always together
    if unit > 1:
        x_BTC = x_BTC.unflatten(1, (-1, unit)).flatten(2)
    size, step = size // unit, step // unit
    count = (x_BTC.shape[1] - size) // step + 1
    parts = [x_BTC[:, at:at + (count - 1) * step + 1:step] for at in range(size)]
    return torch.cat(parts, dim=-1)


class _Mel(nn.Module):
    """See `cloister.model.front.Mel`."""

    def __init__(self, build: _Builder, front: Mel) -> None:
        super().__init__()
        self.shape = front.shape
        waves, filters = front.waves.squeeze(1), front.filters.squeeze(-1)
        half = len(waves) // 2
        prefix = build.prefix

        def spectrum(g: Subgraph, x: Value) -> list[Value]:
            real = g.dense(x, f"{prefix}.front.cosines", waves[:half], None)
            imaginary = g.dense(x, f"{prefix}.front.sines", waves[half:], None)
            power = g.add(g.multiply(real, real), g.multiply(imaginary, imaginary))
            return [g.dense(power, f"{prefix}.front.filters", filters, None)]

        self.spectrum = build("front", waves.shape[1], spectrum)

    def forward(self, x_11N: torch.Tensor) -> torch.Tensor:
        half, hop = self.shape.window // 2, self.shape.hop
        x_1N1 = functional.pad(x_11N, (half, half - hop), mode="reflect").transpose(1, 2)
        x_1TR: Any = self.spectrum(_windows(x_1N1, self.shape.window, hop))
        return Mel.scaled(x_1TR.transpose(1, 2))


class _Patches(nn.Module):
    def __init__(self, build: _Builder, stem: Any) -> None:
        super().__init__()
        weight = stem.convolution.weight
        self.size = weight.shape[2]
        self.dense = build.dense(
            "encoder.stem.convolution", weight.flatten(1), stem.convolution.bias, gelu=False)

    def forward(self, x_BCRW: torch.Tensor) -> torch.Tensor:
        size = self.size
        rows, columns = x_BCRW.shape[2] // size, x_BCRW.shape[3] // size
        x = x_BCRW[..., :columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        out_BND: Any = self.dense(x.flatten(1, 2))
        return out_BND.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return]


class _Convolutions1d(nn.Module):
    def __init__(self, build: _Builder, stem: Any) -> None:
        super().__init__()
        self.first, self.second = (
            build.dense(f"encoder.stem.{name}", each.weight.transpose(1, 2).flatten(1), each.bias,
                        gelu=True)
            for name, each in (("first", stem.first), ("second", stem.second)))

    def forward(self, x_B1RW: torch.Tensor) -> torch.Tensor:
        x: Any = x_B1RW.squeeze(1).transpose(1, 2)
        x = self.first(_windows(functional.pad(x, (0, 0, 1, 1)), 3, 1))
        x = self.second(_windows(functional.pad(x, (0, 0, 1, 1)), 3, 2))
        return x.transpose(1, 2).unsqueeze(2)  # type: ignore[no-any-return]


class _Convolutions2d(nn.Module):
    def __init__(self, build: _Builder, stem: Any) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            build.dense(f"encoder.stem.convolutions.{number}",
                        each.weight.permute(0, 2, 3, 1).flatten(1), each.bias, gelu=True)
            for number, each in enumerate(stem.convolutions))
        self.linear = build.linear("encoder.stem.linear", stem.linear)

    def forward(self, x_BCRW: torch.Tensor) -> torch.Tensor:
        x = x_BCRW.permute(0, 2, 3, 1)
        for convolution in self.convolutions:
            x = functional.pad(x, (0, 0, 1, 1, 1, 1))
            rows, columns = ((size - 1) // 2 for size in x.shape[1:3])
            x = convolution(torch.cat([
                x[:, row:row + 2 * rows - 1:2, column:column + 2 * columns - 1:2]
                for row in range(3) for column in range(3)], dim=-1))
        out_BWD: Any = self.linear(x.permute(0, 2, 3, 1).flatten(2))
        return out_BWD.transpose(1, 2).unsqueeze(2)  # type: ignore[no-any-return]


_STEMS: dict[Stem, Any] = {
    Stem.PATCHES: _Patches, Stem.CONVOLUTIONS_1D: _Convolutions1d,
    Stem.CONVOLUTIONS_2D: _Convolutions2d,
}
