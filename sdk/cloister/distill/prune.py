"""A student cut out of its teacher, by what the teacher's activations say is needed.

Shapes: D hidden size, F feed-forward size, H query heads, G KV heads, K head size.

After Minitron (arXiv 2407.14679): channels of the residual stream by the magnitude of the norms'
outputs, feed-forward neurons and heads by that of their own outputs, layers by how much they change
what passes through them (arXiv 2403.03853).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn import functional

from cloister.errors import SettingError, VocabularyMismatch
from cloister.model.transformer import Attention, Block, Decoder, FeedForward, RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from cloister.model.config import ModelConfig
    from cloister.tiers import Shape

__all__ = ["fitted", "prune"]

_Key = TypeVar("_Key")


def prune(teacher: Decoder, shape: Shape, batches: Iterable[torch.Tensor]) -> Decoder:
    """A decoder of `shape` with the most used parts of `teacher`, in float32.

    `batches` are tokens, int64[B, T], that the teacher reads to find out. Pruning to the teacher's
    own shape gives the teacher.

    Raises:
        VocabularyMismatch: another vocabulary.
        SettingError: another head size, or a student larger than its teacher somewhere.
    """
    _check(teacher.config.shape, shape)
    usage = _Usage.of(teacher, batches)
    layers = _top(usage.layers, shape.layers)
    channels = _top(usage.channels, shape.hidden_size)
    student = Decoder(fitted(teacher.config, shape, layers))
    with torch.no_grad():
        _copy(student.embed.weight, teacher.embed.weight[:, channels])
        _copy(student.head.weight, (teacher.embed if shape.tied else teacher.head)
              .weight[:, channels])
        _norm(student.norm, teacher.norm, channels, usage)
        for block, number in zip(student.layers, layers, strict=True):
            origin = teacher.layers[number]
            assert isinstance(block, Block) and isinstance(origin, Block)
            _block(block, origin, shape, channels, usage)
    return student.eval()


@dataclass
class _Usage:
    """What passed through a decoder, summed over tokens."""

    channels: torch.Tensor  # [D]
    layers: torch.Tensor  # [L], one less the cosine of a layer's input and output
    neurons: dict[FeedForward, torch.Tensor]  # [F]
    heads: dict[Attention, torch.Tensor]  # [H]
    squares: dict[RMSNorm, torch.Tensor]  # [D], of the inputs

    @classmethod
    def of(cls, decoder: Decoder, batches: Iterable[torch.Tensor]) -> _Usage:
        """Let `decoder` read, and watch."""
        device = decoder.embed.weight.device
        usage = cls(
            channels=torch.zeros(decoder.config.shape.hidden_size, device=device),
            layers=torch.zeros(len(decoder.layers), device=device),
            neurons={}, heads={}, squares={},
        )
        hooks = []
        for module in decoder.modules():
            if isinstance(module, RMSNorm) and len(module.weight) == len(usage.channels):
                hooks.append(module.register_forward_hook(usage._norm))
            elif isinstance(module, FeedForward):
                hooks.append(module.down.register_forward_pre_hook(usage._watch(module)))
            elif isinstance(module, Attention):
                hooks.append(module.o.register_forward_pre_hook(usage._watch(module)))
        for number, layer in enumerate(decoder.layers):
            hooks.append(layer.register_forward_hook(usage._layer(number)))
        try:
            with torch.no_grad():
                for tokens_BT in batches:
                    decoder(tokens_BT.to(device))
        finally:
            for hook in hooks:
                hook.remove()
        return usage

    def _norm(self, module: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        assert isinstance(module, RMSNorm)
        self.channels += _flat(out).abs().sum(0)
        _add(self.squares, module, _flat(inputs[0]).square().sum(0))

    def _watch(self, owner: FeedForward | Attention) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            rows = _flat(inputs[0])
            if isinstance(owner, FeedForward):
                _add(self.neurons, owner, rows.abs().sum(0))
            else:
                heads = rows.unflatten(-1, (-1, owner.head_size))
                _add(self.heads, owner, heads.norm(dim=-1).sum(0))

        return note

    def _layer(self, number: int) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
            alike = functional.cosine_similarity(_flat(inputs[0]), _flat(out), dim=-1)
            self.layers[number] += (1 - alike).sum()

        return note


def _check(teacher: Shape, student: Shape) -> None:
    if teacher.vocab_size != student.vocab_size:
        raise VocabularyMismatch(
            f"The teacher has {teacher.vocab_size} tokens and the student {student.vocab_size}; "
            "both must use one tokenizer: choose another teacher or shape."
        )
    if teacher.head_size != student.head_size:
        raise SettingError(
            f"Heads have size {teacher.head_size} in the teacher and {student.head_size} in the "
            "student; choose a shape with the same size, or begin from scratch."
        )
    for field in fields(student):
        ours, theirs = getattr(student, field.name), getattr(teacher, field.name)
        if field.name != "tied" and ours > theirs:
            raise SettingError(
                f"The student's {field.name} is {ours} and the teacher's {theirs}; a student that "
                "is cut out of its teacher is no larger anywhere: begin from scratch instead."
            )


def fitted(config: ModelConfig, shape: Shape, layers: Sequence[int]) -> ModelConfig:
    """`config` for another shape; each layer has the settings of the one that `layers` names."""
    def kept(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(at for at, number in enumerate(layers) if number in numbers)

    return replace(
        config, shape=shape, windowed_layers=kept(config.windowed_layers),
        no_rope_layers=kept(config.no_rope_layers),
    )


def _block(
    block: Block, origin: Block, shape: Shape, channels: list[int], usage: _Usage
) -> None:
    for name in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"):
        if hasattr(origin, name):
            _norm(getattr(block, name), getattr(origin, name), channels, usage)
    neurons = _top(usage.neurons[origin.mlp], shape.feed_forward)
    for name in ("gate", "up"):
        _linear(getattr(block.mlp, name), getattr(origin.mlp, name), neurons, channels)
    _linear(block.mlp.down, origin.mlp.down, channels, neurons)
    sets = _heads(usage.heads[origin.attn], origin.attn, shape)
    rows = [row for chosen in sets for head in chosen for row in _rows(head, shape.head_size)]
    _linear(block.attn.qkv.q, origin.attn.qkv.q, rows, channels)
    _linear(block.attn.o, origin.attn.o, channels, rows)
    ratio = len(usage.heads[origin.attn]) // (
        origin.attn.qkv.k.out_features // shape.head_size)
    for name in ("k", "v"):
        ours, theirs = getattr(block.attn.qkv, name), getattr(origin.attn.qkv, name)
        for at, chosen in enumerate(sets):
            # The mean of those that the heads of a set were taught with (arXiv 2305.13245).
            groups = sorted({head // ratio for head in chosen})
            to = slice(at * shape.head_size, (at + 1) * shape.head_size)
            cut = [theirs.weight[list(_rows(group, shape.head_size))][:, channels]
                   for group in groups]
            _copy(ours.weight[to], torch.stack(cut).mean(0))
            if theirs.bias is not None:
                biases = [theirs.bias[list(_rows(group, shape.head_size))] for group in groups]
                _copy(ours.bias[to], torch.stack(biases).mean(0))
    for name in ("q_norm", "k_norm"):
        if hasattr(origin.attn, name):
            _copy(getattr(block.attn, name).weight, getattr(origin.attn, name).weight)


def _heads(usage: torch.Tensor, attention: Attention, shape: Shape) -> list[list[int]]:
    """Query heads of the teacher for each KV head of the student.

    Heads that shared keys and values still do, where the student has no more of them to a set.
    """
    ratio, wanted = (
        len(usage) // (attention.qkv.k.out_features // attention.head_size),
        shape.heads // shape.kv_heads,
    )
    if wanted > ratio:
        heads = _top(usage, shape.heads)
        return [heads[at:at + wanted] for at in range(0, len(heads), wanted)]
    best = usage.unflatten(0, (-1, ratio)).topk(wanted, dim=1)
    groups = _top(best.values.sum(1), shape.kv_heads)
    return [[group * ratio + at for at in sorted(best.indices[group].tolist())] for group in groups]


def _norm(ours: RMSNorm, theirs: RMSNorm, channels: list[int], usage: _Usage) -> None:
    """Its own, where it divides by the root mean square of fewer channels, made up for."""
    squares = usage.squares[theirs]
    factor = (squares[channels].mean() / squares.mean()).sqrt()
    offset = 1.0 if theirs.offset else 0.0
    _copy(ours.weight, (theirs.weight[channels] + offset) * factor - offset
          if len(channels) < len(squares) else theirs.weight)


def _linear(ours: nn.Linear, theirs: nn.Linear, rows: list[int], columns: list[int]) -> None:
    _copy(ours.weight, theirs.weight[rows][:, columns])
    if theirs.bias is not None:
        _copy(ours.bias, theirs.bias[rows])


def _copy(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    ours.copy_(theirs)


def _rows(head: int, size: int) -> Iterator[int]:
    yield from range(head * size, (head + 1) * size)


def _top(usage: torch.Tensor, count: int) -> list[int]:
    """Numbers of the `count` most used, in order."""
    return sorted(usage.topk(count).indices.tolist())


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2).float()


def _add(held: dict[_Key, torch.Tensor], key: _Key, value: torch.Tensor) -> None:
    held[key] = held[key] + value if key in held else value
