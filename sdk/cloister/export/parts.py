"""The proof of a program part by part: each computes what the checkpoint's own part computes.

8-bit dynamic activations are chaotic: one that rounds the other way in one layer moves all that
follows, and in 30 layers two correct implementations differ as much as 8 bits cost at all. So a
part is given what the program's own part was given (see `instrument`), and nothing accumulates.
What it gives agrees to about a millionth, but for the rows, a few in a hundred, in which an
activation lies on the edge between two steps. (That weights, scales, norms and rotary tables are
the checkpoint's is proved by their bytes: `constants`.)

The parts are those of `backends/xnnpack.py`: queries, keys and values behind their norm; attention
with its rotation and KV buffers; its output; the feed-forward layer; the sums between; the head.

Shapes: T positions, N features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cloister.backend import KV
from cloister.errors import ExportMismatch
from cloister.model.cache import attend, visible
from cloister_kernels.reference import round_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from torch import nn

    from cloister.model.config import ModelConfig
    from cloister.model.transformer import Decoder

__all__ = ["BOUND", "Gap", "Place", "Recording", "Scored", "ZeroHistory", "decoder_places", "gaps",
           "prove_forward", "prove_parts", "prove_same", "record", "replayed"]

BOUND = 1e-3  # of a feature's own magnitude
STRAY = 250  # times BOUND that a single row may be off, whose activations round otherwise
FAR = 8192  # positions: the last ones below it are read too, where the context holds them
_SIZES = (40, 16, *[1] * 8)  # tokens of each call from the first position on
_FAR_TOKENS = 8
_ENOUGH = 16  # rows for a median
_TINY = torch.finfo(torch.float32).smallest_normal
_NO_FEATURE = 1e-3  # of the features' median: a smaller one counts as that


class Scored(Protocol):
    """A loaded program, instrumented or not."""

    def outputs(self, tokens: torch.Tensor, start: int) -> list[torch.Tensor]:
        """Every output of `score`, the logits first, for int64[1, T] from position `start` on."""

    def kv_buffers(self) -> Mapping[str, torch.Tensor]:
        """Live views of the KV buffers, by name."""


@dataclass(frozen=True)
class Recording:
    """What a program gave for tokens that follow positions of zero keys and values."""

    ends: tuple[int, ...]  # positions between the calls, the first and last included
    tokens: torch.Tensor  # int64[1, T]
    outputs: tuple[torch.Tensor, ...]  # float32[1, T, N] each, as the program gives them
    rounded: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What KV buffers hold of the tokens by name, float16[T, G, D] or int8[T, G, D + 4]."""

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.ends[0]


@dataclass(frozen=True)
class Gap:
    """How far a part of a program is from the checkpoint's.

    A share of each feature's own magnitude, and the largest of all features: in every row where
    nothing is rounded to 8 bits, else in the median row.
    """

    part: str
    size: float


def record(program: Scored, ids: Sequence[int], chunk: int, context: int) -> list[Recording]:
    """Return what `program` gives for `ids` from the first position on, and for some far ones.

    By large calls and small ones, of at most `chunk` tokens.
    """
    for buffer in program.kv_buffers().values():
        buffer.zero_()
    near = [0]
    for size in _SIZES:
        near.append(min(near[-1] + min(size, chunk), len(ids), context))
    last = min(context, FAR)
    far = (last - min(_FAR_TOKENS, chunk, context, len(ids)), last)
    # The far ones first, as long as the buffers are empty.
    return [_run(program, ids, ends) for ends in (far, tuple(dict.fromkeys(near)))]


def _run(program: Scored, ids: Sequence[int], ends: tuple[int, ...]) -> Recording:
    """Record the calls between `ends`, of the first of `ids`."""
    tokens = torch.tensor([ids[:ends[-1] - ends[0]]])
    calls = [
        program.outputs(tokens[:, first - ends[0]:last - ends[0]].contiguous(), first)
        for first, last in pairwise(ends)
    ]
    return Recording(
        ends, tokens, tuple(torch.cat(parts, dim=1) for parts in zip(*calls, strict=True)),
        {name: buffer[0, ends[0]:ends[-1]].clone()
         for name, buffer in program.kv_buffers().items() if buffer.dtype != torch.float32})


def prove_same(program: Sequence[Recording], copy: Sequence[Recording]) -> None:
    """Raise ExportMismatch unless an instrumented copy's logits are the program's, to the bit."""
    for ours, other in zip(program, copy, strict=True):
        if not torch.equal(ours.outputs[0], other.outputs[0]):
            raise ExportMismatch(
                "The program that was checked part by part is not the program of the bundle; "
                "nothing was written, report it."
            )


def prove_forward(
    forward: Callable[[torch.Tensor, int], torch.Tensor], run: Recording
) -> None:
    """Raise ExportMismatch unless `forward` gives the last row of what `score` gave in `run`.

    `run` begins at the first position.
    """
    for first, last in pairwise(run.ends):
        expected_V = run.outputs[0][0, last - 1]
        (got_V,) = forward(run.tokens[:, first:last].contiguous(), first)
        gap = float((got_V - expected_V).norm() / (expected_V.norm() + _TINY))
        if not gap <= BOUND:
            raise ExportMismatch(
                f"The program's two methods differ by {gap:.2g} of the logits (at most "
                f"{BOUND:g}); nothing was written, report it."
            )


def prove_parts(gaps: Iterable[Gap]) -> Gap:
    """Return the largest gap.

    Raises:
        ExportMismatch: a part is not within BOUND of the checkpoint's.
    """
    worst = Gap("", 0.0)
    for gap in gaps:
        if not gap.size <= BOUND:  # a NaN is none
            raise ExportMismatch(
                f"Part {gap.part} of the program differs from the checkpoint by {gap.size:.2g} of "
                f"what it gives (at most {BOUND:g}); nothing was written, report it."
            )
        worst = max(worst, gap, key=lambda each: each.size)
    return worst


Place = tuple["nn.Module", str, bool, Sequence[torch.Tensor]]
"""A module at a delegate's edge, what it is called, whether the values are those that it reads or
those that it gives, and the program's values."""


def gaps(
    decoder: Decoder, run: Recording, calls: Sequence[Sequence[int]],
    kv: KV = KV.FLOAT32,
) -> list[Gap]:
    """Return how far each part of a program is from the part of `decoder`, in order.

    `calls` are those of `instrument`; `kv` is what the program keeps keys and values in.
    """
    attention = ZeroHistory(decoder.config, run.start, kv=kv, rounded=run.rounded)

    def compute() -> torch.Tensor:
        return decoder.logits(decoder.hidden(run.tokens, run.start, attention))

    found = replayed(
        decoder_places(decoder, calls, run.outputs), compute, run.outputs[0], "logits")
    return found + attention.gaps


def replayed(
    places: Iterable[Place], compute: Callable[[], torch.Tensor], given: torch.Tensor, part: str,
    *, activated: Collection[str] = ()
) -> list[Gap]:
    """Return the gaps at `places`, whose values take the place of those that `compute` makes.

    Last that between what it gives and the program's `given`, called `part`. What the parts called
    `activated` read comes from an activation.
    """
    found: list[Gap] = []
    hooks = []
    for module, name, reads, values in places:
        hook = _Replacer(found, name, values, activated=name in activated)
        hooks.append(
            module.register_forward_pre_hook(hook.reads) if reads
            else module.register_forward_hook(hook.gives))
    try:
        with torch.inference_mode():
            out = compute()
    finally:
        for handle in hooks:
            handle.remove()
    found.append(Gap(part, _exact(_rows(out), _rows(given))))
    return found


def decoder_places(
    decoder: Decoder, calls: Sequence[Sequence[int]], outputs: Sequence[torch.Tensor]
) -> Iterator[Place]:
    """Yield the places of a decoder, in order.

    `calls` are those of `instrument`, `outputs` what the program gave.
    """
    values = [[outputs[place] for place in call] for call in calls]
    delegates = len(calls) == 3 * len(decoder.layers) + 1
    return (_places if delegates else _own_places)(decoder, values)


def _own_places(decoder: Decoder, calls: Sequence[Sequence[torch.Tensor]]) -> Iterator[Place]:
    """Yield the places of a decoder whose program calls operators of our own.

    Of a layer these are queries, keys and values in one, or one after the other; attention; output,
    and the sum; gate and up; down, and the sum. Behind an output and a down there may be a norm,
    and then the sum.
    """
    shape, blocks, left = decoder.config.shape, decoder.layers, deque(calls)
    sizes = [heads * shape.head_size for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    for number, block in enumerate(blocks):
        made: Any = block
        x, qkv = _joined(left, sum(sizes))
        left.popleft()  # attention
        attended, o = left.popleft()
        middle, gate_up = _joined(left, 2 * shape.feed_forward)
        _, down = left.popleft()
        after, name = left[0][0], f"layers.{number}"
        yield made, f"{name}.input", True, [x]
        yield made.attn.qkv, f"{name}.attn.qkv", False, qkv.split(sizes, dim=-1)
        yield made.attn.o, f"{name}.attn", True, [attended]
        last = made.attn.o
        if made.post_norms:
            yield last, f"{name}.attn.o.product", False, [o]
            last = made.attn_post_norm
        yield last, f"{name}.attn.o", False, [middle - x]
        yield made.mlp_norm, f"{name}.middle", True, [middle]
        gate, up = gate_up.chunk(2, dim=-1)
        yield made.mlp.gate, f"{name}.mlp.gate", False, [gate]
        yield made.mlp.up, f"{name}.mlp.up", False, [up]
        last = made.mlp
        if made.post_norms:
            yield last, f"{name}.mlp.product", False, [down]
            last = made.mlp_post_norm
        yield last, f"{name}.mlp", False, [after - middle]
    ((x, logits),) = left
    yield decoder.norm, "output", True, [x]
    yield decoder.head, "head", False, [logits]


def _joined(
    calls: deque[Sequence[torch.Tensor]], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the calls with one input that give `width` features; return the input, and these."""
    x, given = calls.popleft()
    while given.shape[-1] < width:
        given = torch.cat((given, calls.popleft()[1]), dim=-1)
    return x, given


def _places(decoder: Decoder, calls: Sequence[Sequence[torch.Tensor]]) -> Iterator[Place]:
    assert len(calls) == 3 * len(decoder.layers) + 1
    blocks: Any = decoder.layers
    for number, block in enumerate(blocks):
        qkv, o, mlp = calls[3 * number:3 * number + 3]
        name = f"layers.{number}"
        yield block, f"{name}.input", True, qkv[:1]
        yield block.attn.qkv, f"{name}.attn.qkv", False, qkv[1:]
        yield block.attn.o, f"{name}.attn", True, o[:1]
        last = block.attn_post_norm if block.post_norms else block.attn.o
        yield last, f"{name}.attn.o", False, o[1:]
        yield block.mlp_norm, f"{name}.middle", True, mlp[:1]
        last = block.mlp_post_norm if block.post_norms else block.mlp
        yield last, f"{name}.mlp", False, mlp[1:]
    yield decoder.norm, "output", True, calls[-1][:1]
    yield decoder.head, "head", False, calls[-1][1:]


class _Replacer:
    """Compares what a module reads or gives with the program's values, and puts these in place."""

    def __init__(
        self, found: list[Gap], part: str, given: Sequence[torch.Tensor], *, activated: bool
    ) -> None:
        self.found, self.part, self.given, self.activated = found, part, given, activated

    def reads(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        (given,) = self.given
        # Where the head reads the last row only, so does the program's last norm.
        expected_TN = _rows(arguments[0])[-_rows(given).shape[0]:]
        self.found.append(
            Gap(self.part, _exact(expected_TN, _rows(given), activated=self.activated)))
        whole = given.numel() == arguments[0].numel()
        return (given.reshape(arguments[0].shape) if whole else given, *arguments[1:])

    def gives(self, _: nn.Module, __: object, out: Any) -> Any:
        several = isinstance(out, tuple)
        expected = out if several else (out,)
        self.found += [
            Gap(self.part, _rounded(_rows(each), _rows(got)))
            for each, got in zip(expected, self.given, strict=True)
        ]
        given = tuple(
            got.reshape(each.shape) for each, got in zip(expected, self.given, strict=True))
        return given if several else given[0]


class ZeroHistory:
    """Attention behind `start` positions whose keys and values are zero."""

    def __init__(
        self, config: ModelConfig, start: int = 0, blocks_T: torch.Tensor | None = None,
        *, kv: KV = KV.FLOAT32, rounded: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """With `blocks_T`, see `cloister.model.cache.visible`; keys and values are kept in `kv`.

        Those that a program has `rounded` take the place of the checkpoint's, and `gaps` says how
        far they are from these: some lie halfway between two steps, and each of them would be
        heard in all rows after it.
        """
        self.config, self.start, self.blocks_T, self.kv = config, start, blocks_T, kv
        self.rounded, self.gaps = rounded or {}, list[Gap]()

    def __call__(
        self, layer: int, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor
    ) -> torch.Tensor:
        """See `cloister.model.cache.Attend`."""
        config, size = self.config, k_BTGD.shape
        k_BTGD, v_BTGD = (self._kept(f"layers.{layer}.attn.{side}_cache", x)
                          for side, x in (("k", k_BTGD), ("v", v_BTGD)))
        before = k_BTGD.new_zeros(size[0], self.start, *size[2:])
        return attend(
            q_BTHD, torch.cat((before, k_BTGD), dim=1), torch.cat((before, v_BTGD), dim=1),
            visible(size[1], self.start + size[1], self.start, config.window_of(layer),
                    self.blocks_T),
            scale=config.attention_scale, softcap=config.attention_softcap,
        )

    def _kept(self, name: str, x_BTGD: torch.Tensor) -> torch.Tensor:
        """Return keys or values as they come out of a cache."""
        if name in self.rounded:
            kept, gap = _compared(self.rounded[name], x_BTGD[0])
            self.gaps.append(Gap(name, gap))
            return kept[None]
        if self.kv is KV.INT8:
            return round_cache(x_BTGD)
        return x_BTGD.half().float() if self.kv is KV.FLOAT16 else x_BTGD


def _compared(entries: torch.Tensor, x_TGD: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return what a cache's `entries` hold, and how far that is from `x_TGD`.

    A step between two numbers that it can hold counts as BOUND; a scale as it is.
    """
    if entries.dtype == torch.float16:
        kept, off = entries.float(), []
        half = torch.finfo(torch.float16)
        step = x_TGD.abs().clamp(min=half.smallest_normal) * half.eps
    else:
        size = x_TGD.shape[-1]
        step = entries[..., size:].contiguous().view(torch.float32)
        kept = entries[..., :size] * step
        scale = x_TGD.abs().amax(-1, keepdim=True) / 127
        off = [((step - scale).abs() / (scale + _TINY)).flatten()]
    off.append((BOUND * (kept - x_TGD).abs() / (step + _TINY)).flatten())
    return kept, float(torch.cat(off).max())  # a NaN comes through


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return the rows of features, [T, N]."""
    return x.reshape(-1, x.shape[-1])


def _exact(
    expected_TN: torch.Tensor, got_TN: torch.Tensor, *, activated: bool = False
) -> float:
    """Return the largest difference, as a share of the value and its feature's magnitude.

    Of an `activated` feature, which may be all but 0 everywhere, that is counted as a share of the
    largest value at least: where XNNPACK's GELU is almost 0 it is up to 8e-7 off.
    """
    size_TN = expected_TN.abs()
    least = _NO_FEATURE * float(size_TN.max()) if activated else 0.0
    magnitude_N = _magnitude(size_TN).clamp(min=least)
    return float(((expected_TN - got_TN).abs() / (size_TN + magnitude_N)).max())


def _rounded(expected_TN: torch.Tensor, got_TN: torch.Tensor) -> float:
    """Return the difference in the median row, of the feature in which it is largest.

    Or a STRAY-th of that of the row that is furthest off, if that is more.
    """
    off_TN, size_TN = (expected_TN - got_TN).abs(), expected_TN.abs()
    sizes = [off_TN.norm(dim=1) / (size_TN.norm(dim=1) + _TINY) / STRAY]
    if len(off_TN) >= _ENOUGH:
        sizes.append(off_TN.median(0).values / _magnitude(size_TN))
    return float(torch.cat(sizes).max())  # a NaN comes through


def _magnitude(size_TN: torch.Tensor) -> torch.Tensor:
    size_N = size_TN.median(0).values
    return size_N + _NO_FEATURE * size_N.median() + _TINY
