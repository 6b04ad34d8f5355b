"""Cloister's own operators: weights packed once, at export, and read from the file's mapping.

The program is traced with a token in the place of each matrix, and written with the matrices read
from the checkpoint, packed and put in their places one at a time: what it takes does not grow with
the model.

Shapes: T new positions, C context, D hidden size, H query heads, G KV heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cloister.errors import ExportError
from cloister.export import _executorch
from cloister.export.graph import first_position, traced
from cloister.model.blocks import Blocks
from cloister.model.config import Activation
from cloister.model.transformer import RMSNorm
from cloister_kernels.ops import Input
from cloister_kernels.pack import TILE, Format, pack, pack_gguf, tile_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cloister.backend import KV
    from cloister.export._executorch import schema
    from cloister.model.config import ModelConfig
    from cloister.model.transformer import Decoder
    from cloister.progress import Progress

__all__ = ["matrices", "program", "stored"]

_HEAD_SIZES = 16  # a multiple of it; the vectors of attention
_ALIGNMENT = 64  # bytes; of each matrix within the file
_TOKEN = b"matrix"  # and its number, in place of its data


@dataclass(frozen=True)
class _Matrix:
    """Rows of matrices of the checkpoint that share an input, one below the other."""

    names: tuple[str, ...]
    form: Format
    inputs: int
    outputs: int

    @property
    def size_bytes(self) -> int:
        return -(-self.outputs // TILE) * tile_bytes(self.form, self.inputs)


class _Matrices:
    """Gives each matrix of a program a number, and a token that stands for its data."""

    def __init__(self) -> None:
        self.all: list[_Matrix] = []

    def token(self, matrix: _Matrix) -> torch.Tensor:
        """Return the token of `matrix`, that of an equal one: it is in the program once."""
        if matrix not in self.all:
            self.all.append(matrix)
        data = _TOKEN + self.all.index(matrix).to_bytes(4, "big")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def matrices(decoder: Decoder) -> list[_Matrix]:
    """Return the matrices that a program of `decoder` holds, each once."""
    found = [_matrix(decoder, ("embed",))]
    for number in range(decoder.config.shape.layers):
        layer = f"layers.{number}"
        for names in (tuple(f"{layer}.attn.qkv.{part}" for part in "qkv"), (f"{layer}.attn.o",),
                      (f"{layer}.mlp.gate", f"{layer}.mlp.up"), (f"{layer}.mlp.down",)):
            found += [_matrix(decoder, alike) for alike in _alike(decoder, names)]
    head = _matrix(decoder, ("head",))
    return found if head in found else [*found, head]


def _alike(decoder: Decoder, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Divide matrices with one input into those that are one, since their formats are the same."""
    return [tuple(some) for _, some in groupby(
        names, key=lambda name: _form(decoder.get_submodule(name)))]


def _matrix(decoder: Decoder, names: tuple[str, ...]) -> _Matrix:
    modules: list[Any] = [decoder.get_submodule(name) for name in names]
    form, shape = _form(modules[0]), decoder.config.shape
    if names in (("embed",), ("head",)):
        # One matrix that is stored once, where they are tied.
        names = ("embed",) if shape.tied else names
        return _Matrix(names, form, shape.hidden_size, shape.vocab_size)
    return _Matrix(
        names, form, modules[0].in_features, sum(each.out_features for each in modules))


def _form(module: Any) -> Format:
    """Return the format of a quantized module's matrix."""
    scheme = module.scheme
    if isinstance(scheme, Blocks):
        return Format[scheme.kind]
    return Format.W8 if scheme.group is None else Format.W4


class _Linear(nn.Module):
    """A matrix of the checkpoint, or several with one input, behind what is done to it first."""

    norm: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, made: _Making, names: tuple[str, ...], *, norm: str | None = None,
                 kind: Input = Input.PLAIN) -> None:
        super().__init__()
        self.matrix = _matrix(made.decoder, names)
        self.kind = Input.NORMED if norm else kind
        self.eps = made.config.norm_eps
        self.register_buffer("weights", made.matrices.token(self.matrix))
        self.register_buffer("norm", made.norm(norm) if norm else None)
        self.register_buffer(
            "bias", _bias(made.read, names) if _biased(made.decoder, names) else None)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.cloister.linear(
            x, self.weights, int(self.matrix.form), self.matrix.outputs, int(self.kind), self.norm,
            self.eps, self.bias, residual, False)
        return out


class _Joined(nn.Module):
    """Matrices with one input whose formats differ, and what they give as one."""

    def __init__(self, made: _Making, names: tuple[str, ...], norm: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            _Linear(made, alike, norm=norm) for alike in _alike(made.decoder, names))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = [part(x) for part in self.parts]
        return given[0] if len(given) == 1 else torch.cat(given, dim=-1)


@dataclass(frozen=True)
class _Making:
    """What the modules of a program are made of."""

    decoder: Decoder  # without weights
    read: Callable[[str], torch.Tensor]
    matrices: _Matrices
    kv: KV

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    def norm(self, name: str) -> torch.Tensor:
        return _norm(self.config, self.read, name)


class _Layer(nn.Module):
    def __init__(self, made: _Making, number: int, table: tuple[torch.Tensor, torch.Tensor]
                 ) -> None:
        super().__init__()
        config, name = made.config, f"layers.{number}"
        shape, self.number = config.shape, number
        gated = Input.GATED_SILU if config.activation is Activation.SILU else Input.GATED_GELU
        self.qkv = _Joined(
            made, tuple(f"{name}.attn.qkv.{part}" for part in "qkv"), f"{name}.attn_norm")
        self.o = _Linear(made, (f"{name}.attn.o",))
        self.gate_up = _Joined(
            made, (f"{name}.mlp.gate", f"{name}.mlp.up"), f"{name}.mlp_norm")
        self.down = _Linear(made, (f"{name}.mlp.down",), kind=gated)
        for each in ("attn_post_norm", "mlp_post_norm"):
            self.register_buffer(each, made.norm(f"{name}.{each}") if config.post_norms else None)
        for each in ("q_norm", "k_norm"):
            self.register_buffer(
                each, made.norm(f"{name}.attn.{each}") if config.qk_norm else None)
        self.table = (None, None) if number in config.no_rope_layers else table
        self.config = config
        kind = getattr(torch, made.kv)
        size = (1, shape.context, shape.kv_heads,
                made.kv.head_bytes(shape.head_size) // kind.itemsize)
        self.attn = nn.Module()
        for cache in ("k_cache", "v_cache"):
            self.attn.register_buffer(cache, torch.zeros(size, dtype=kind))

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        config, run = self.config, torch.ops.cloister
        attended = run.attention(
            self.qkv(x), self.attn.k_cache, self.attn.v_cache, start, *self.table,
            self.q_norm, self.k_norm, config.shape.heads, config.norm_eps, config.attention_scale,
            config.attention_softcap or 0.0, config.window_of(self.number) or 0)
        if not config.post_norms:
            x = self.o(attended, x)
            return self.down(self.gate_up(x), x)  # type: ignore[no-any-return]
        x = run.norm(self.o(attended), self.attn_post_norm, config.norm_eps, x)
        return run.norm(  # type: ignore[no-any-return]
            self.down(self.gate_up(x)), self.mlp_post_norm, config.norm_eps, x)


class _Program(nn.Module):
    """The method `score`; with `last` the method `forward`."""

    last = False

    def __init__(self, made: _Making) -> None:
        super().__init__()
        config, decoder = made.config, made.decoder
        matrix, shape = _matrix(decoder, ("embed",)), config.shape
        self.config, self.form = config, matrix.form
        self.register_buffer("embed", made.matrices.token(matrix))
        names = ("cos", "sin") if config.local_rope_theta is None else (
            "cos", "sin", "local_cos", "local_sin")
        for name in names:
            table: torch.Tensor = getattr(decoder, name)
            self.register_buffer(name, table.squeeze(1).contiguous())
        self.layers = nn.ModuleList(
            _Layer(made, number, self._table(number)) for number in range(shape.layers))
        self.head = _Linear(made, ("head",), norm="norm")

    def _table(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        if config.local_rope_theta is not None and layer in config.windowed_layers:
            return self.local_cos, self.local_sin  # type: ignore[return-value]
        return self.cos, self.sin  # type: ignore[return-value]

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        config, shape = self.config, self.config.shape
        start = first_position(start_pos, tokens.shape[1], shape.context)
        x = torch.ops.cloister.embedding(
            tokens, self.embed, int(self.form), shape.vocab_size, shape.hidden_size)
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        for layer in self.layers:
            x = layer(x, start)
        logits: torch.Tensor = self.head(x[:, -1:] if self.last else x)
        if config.final_softcap is not None:
            logits = config.final_softcap * torch.tanh(logits / config.final_softcap)
        return logits[:, 0] if self.last else logits


def program(
    decoder: Decoder, read: Callable[[str], torch.Tensor], mosts: Mapping[str, int],
    constants: Mapping[str, object], path: Path, kv: KV, progress: Progress,
) -> schema.Program:
    """Write the program of a quantized checkpoint to `path`, and return its plan.

    `decoder` is the checkpoint's, whose weights are not looked at; `read` gives them by name.
    `mosts` are the most tokens a call of each method takes. `progress` is called with the name of
    each stage (see `cloister.export.write.STAGES`).

    Raises:
        ExportError: a head size that the operators do not have.
    """
    config = decoder.config
    if config.shape.head_size % _HEAD_SIZES:
        raise ExportError(
            f"Heads of {config.shape.head_size} entries have no operators of Cloister's own; use "
            "--backend xnnpack.")
    progress("trace")
    made = _Making(decoder, read, _Matrices(), kv)
    module = _Program(made)
    tokens, methods = torch.zeros(1, 2, dtype=torch.int64), {}
    for name, most in mosts.items():
        module.last = name == "forward"
        methods[name] = traced(module, tokens, most)
    progress("convert")
    edge = _executorch.to_edge(methods)
    progress("plan")
    manager = _executorch.to_program(
        {name: edge.exported_program(name) for name in methods}, constants,
        _executorch.NamedDataStore())
    progress("write")
    with path.open("wb") as file:
        manager.write_to_file(file)
    return _fill(path, made.matrices.all, read)


def stored(
    decoder: Decoder, read: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every constant of the program of a checkpoint, as it holds them, with its names.

    `decoder` is the checkpoint's without weights, `read` gives its tensors by name.
    """
    config = decoder.config
    for matrix in matrices(decoder):
        yield ", ".join(matrix.names), _packed(read, matrix)
        if _biased(decoder, matrix.names):
            yield f"{matrix.names[0]}.bias", _bias(read, matrix.names)
    for name, module in decoder.named_modules():
        if isinstance(module, RMSNorm):
            yield name, _norm(config, read, name)
    yield from ((name, table) for name, table in decoder.named_buffers() if "." not in name)


def _norm(
    config: ModelConfig, read: Callable[[str], torch.Tensor], name: str
) -> torch.Tensor:
    weight = read(f"{name}.weight").float()
    return weight + 1.0 if config.norm_offset else weight


def _biased(decoder: Decoder, names: tuple[str, ...]) -> bool:
    return getattr(decoder.get_submodule(names[0]), "bias", None) is not None


def _bias(read: Callable[[str], torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([read(f"{name}.bias").float() for name in names])


def _packed(read: Callable[[str], torch.Tensor], matrix: _Matrix) -> torch.Tensor:
    """Return matrices of a checkpoint as a program holds them, uint8[bytes]."""

    def whole(part: str) -> torch.Tensor:
        return torch.cat([read(f"{name}.weight.{part}") for name in matrix.names])

    if matrix.form in (Format.W4, Format.W8):
        return pack(whole("q"), whole("scale"))[1].flatten()
    return pack_gguf(matrix.form, whole("blocks"), matrix.inputs).flatten()


def _fill(
    path: Path, found: Sequence[_Matrix], read: Callable[[str], torch.Tensor]
) -> schema.Program:
    """Put matrices into the program in `path` in place of their tokens, one at a time."""
    with path.open("rb") as file:
        program, base = _executorch.read_program(file)
    (segment,), places = program.segments, program.constant_segment.offsets
    data = path.read_bytes()[base + segment.offset:]
    pieces = [data[first:last] for first, last in pairwise((*places, segment.size))]
    sizes = [len(piece) for piece in pieces]
    held = {}
    for index, piece in enumerate(pieces):
        if piece.startswith(_TOKEN):
            held[index] = found[int.from_bytes(piece[len(_TOKEN):len(_TOKEN) + 4], "big")]
            sizes[index] = held[index].size_bytes
    ends = list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
    program.constant_segment.offsets = [0, *ends[:-1]]
    segment.size = ends[-1]
    for plan in program.execution_plan:
        for value in plan.values:
            index = getattr(value.val, "data_buffer_idx", 0)
            if index in held:
                value.val.sizes, value.val.dim_order = [sizes[index]], [0]
    with path.open("wb") as file:
        _executorch.write_program(file, program, segment.size)
        for index, piece in enumerate(pieces):
            if index in held:
                file.write(_packed(read, held[index]).numpy().data)
            else:
                file.write(piece)
            file.write(bytes(-sizes[index] % _ALIGNMENT))
    return program
