"""Structured pruning: a student cut out of its teacher, by the teacher's activations.

Shapes: D hidden size, F feed-forward size, H query heads, G KV heads, K head size.

After Minitron (arXiv 2407.14679): channels of the residual stream by the magnitude of the norms'
outputs, feed-forward neurons and heads by that of their own outputs, layers by how much they change
what passes through them (arXiv 2403.03853).
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn import functional

from cloister.distill.data import Packed
from cloister.errors import SettingError, VocabularyMismatch
from cloister.model.transformer import Attention, FeedForward, RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from cloister.distill.data import Batch
    from cloister.distill.parallel import Sharded
    from cloister.model.config import ModelConfig
    from cloister.tiers import Shape

__all__ = ["Cut", "Usage", "check_shapes", "check_vocabulary", "fitted"]

_Key = TypeVar("_Key")


class Usage:
    """The magnitudes of a decoder's activations, summed over tokens."""

    def __init__(self, model: Sharded, batches: Iterable[Batch]) -> None:
        """Let `model` read `batches`, whose padding does not count."""
        decoder, device = model.decoder, model.parallel.device
        self.channels = torch.zeros(decoder.config.shape.hidden_size, device=device)
        # One less the cosine of a layer's input and output, [L].
        self.layers = torch.zeros(len(decoder.layers), device=device)
        self.neurons: dict[int, torch.Tensor] = {}  # by layer, [F]
        self.heads: dict[int, torch.Tensor] = {}  # by layer, [H]
        self.squares: dict[str, torch.Tensor] = {}  # of the inputs of a norm, by its name, [D]
        hooks = []
        for name, module in decoder.named_modules():
            if isinstance(module, RMSNorm) and not name.endswith(("q_norm", "k_norm")):
                hooks.append(module.register_forward_hook(self._watch_norm(name)))
        for number, layer in enumerate(decoder.layers):
            hooks.append(layer.register_forward_hook(self._watch_layer(number)))
            for part in layer.children():
                if isinstance(part, FeedForward | Attention):
                    out = part.down if isinstance(part, FeedForward) else part.o
                    hooks.append(out.register_forward_pre_hook(self._watch_part(number, part)))
        try:
            with torch.no_grad():
                for batch in batches:
                    self._read(model, batch.to(device))
        finally:
            for hook in hooks:
                hook.remove()
            model.release()

    def _read(self, model: Sharded, batch: Batch) -> None:
        self._full = (batch.segments_BT >= 0).flatten()  # positions that are no padding
        attend = Packed(model.decoder.config, batch.segments_BT)
        model(lambda: model.decoder.hidden(batch.tokens_BT, 0, attend))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of `x`, [B, T, ...], that are no padding, in float32."""
        return x.flatten(0, 1)[self._full].float()

    def _watch_norm(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
            self.channels += self._rows(out).abs().sum(0)
            _add(self.squares, name, self._rows(inputs[0]).square().sum(0))

        return note

    def _watch_part(self, number: int, part: FeedForward | Attention) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            rows = self._rows(inputs[0])
            if isinstance(part, FeedForward):
                _add(self.neurons, number, rows.abs().sum(0))
            else:
                heads = rows.unflatten(-1, (-1, part.head_size))
                _add(self.heads, number, heads.norm(dim=-1).sum(0))

        return note

    def _watch_layer(self, number: int) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
            similarity = functional.cosine_similarity(
                self._rows(inputs[0]), self._rows(out), dim=-1)
            self.layers[number] += (1 - similarity).sum()

        return note


class Cut:
    """A student of another shape with the most used parts of its teacher, tensor by tensor.

    Cut to the teacher's own shape, it is the teacher.

    Raises:
        VocabularyMismatch, SettingError: see `check_shapes`.
    """

    def __init__(self, config: ModelConfig, shape: Shape, usage: Usage) -> None:
        check_shapes(config.shape, shape)
        self._teacher, self._student, self._usage = config.shape, shape, usage
        self._layers = _top(usage.layers, shape.layers)
        self._channels = _top(usage.channels, shape.hidden_size)
        self._neurons = cache(lambda layer: _top(usage.neurons[layer], shape.feed_forward))
        self._heads = cache(self._choose_heads)
        self.config = fitted(config, shape, self._layers)

    def tensor(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return the student's tensor called `name`, cut out of what `read` gives of the teacher.

        A teacher whose head is tied gives its embedding by the head's name, too.
        """
        if name in ("embed.weight", "head.weight"):
            return read(name)[:, self._channels]
        if name == "norm.weight":
            return self._norm(name, read(name))
        _, number, rest = name.split(".", 2)
        layer = self._layers[int(number)]
        origin = f"layers.{layer}.{rest}"
        whole, kind = read(origin).float(), rest.rpartition(".")[0]
        if kind.endswith(("q_norm", "k_norm")):
            return whole
        if kind.endswith("_norm"):
            return self._norm(origin, whole)
        if kind in ("attn.qkv.k", "attn.qkv.v"):
            return self._shared(whole, layer)
        if kind in ("attn.o", "mlp.down"):
            rows, columns = self._channels, self._inner(kind, layer)
        else:
            rows, columns = self._inner(kind, layer), self._channels
        return whole[rows] if whole.dim() == 1 else whole[rows][:, columns]

    def _inner(self, kind: str, layer: int) -> list[int]:
        """Return the columns that remain of what a part of a layer computes: neurons, or heads."""
        if kind.startswith("mlp"):
            return self._neurons(layer)
        return [place for chosen in self._heads(layer) for head in chosen
                for place in self._places(head)]

    def _shared(self, whole: torch.Tensor, layer: int) -> torch.Tensor:
        """Return keys or values: the mean over the groups that the heads of a set come from.

        As arXiv 2305.13245 makes fewer of them.
        """
        ratio, sets = self._teacher.heads // self._teacher.kv_heads, []
        for chosen in self._heads(layer):
            groups = sorted({head // ratio for head in chosen})
            sets.append(torch.stack([whole[self._places(group)] for group in groups]).mean(0))
        cut = torch.cat(sets)
        return cut if cut.dim() == 1 else cut[:, self._channels]

    def _choose_heads(self, layer: int) -> list[list[int]]:
        """Return the teacher's query heads for each KV head of the student.

        Heads that shared keys and values still do, where the student has no more of them to a set.
        """
        usage, teacher, shape = self._usage.heads[layer], self._teacher, self._student
        ratio, wanted = teacher.heads // teacher.kv_heads, shape.heads // shape.kv_heads
        if wanted > ratio:
            heads = _top(usage, shape.heads)
            return [heads[at:at + wanted] for at in range(0, len(heads), wanted)]
        best = usage.unflatten(0, (-1, ratio)).topk(wanted, dim=1)
        groups = _top(best.values.sum(1), shape.kv_heads)
        return [
            [group * ratio + at for at in sorted(best.indices[group].tolist())] for group in groups]

    def _norm(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weights of a norm, corrected for the mean over fewer channels."""
        squares = self._usage.squares[name.removesuffix(".weight")].to(weight.device)
        if len(self._channels) == len(squares):
            return weight
        factor = (squares[self._channels].mean() / squares.mean()).sqrt()
        offset = 1.0 if self.config.norm_offset else 0.0
        return (weight.float()[self._channels] + offset) * factor - offset

    def _places(self, head: int) -> list[int]:
        size = self._teacher.head_size
        return list(range(head * size, (head + 1) * size))


def check_vocabulary(teacher: Shape, student: Shape) -> None:
    """Raise VocabularyMismatch unless both shapes have one vocabulary."""
    if teacher.vocab_size != student.vocab_size:
        raise VocabularyMismatch(
            f"The teacher has {teacher.vocab_size} tokens and the student {student.vocab_size}; "
            "both must use one tokenizer: choose another teacher or shape."
        )


def check_shapes(teacher: Shape, student: Shape) -> None:
    """Raise unless a decoder of one shape can be cut out of one of the other.

    Raises:
        VocabularyMismatch: another vocabulary.
        SettingError: another head size, or a student larger than its teacher somewhere.
    """
    check_vocabulary(teacher, student)
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
    """Return `config` for another shape, each layer with the settings of the one `layers` names."""
    def renumbered(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(at for at, number in enumerate(layers) if number in numbers)

    return replace(
        config, shape=shape, windowed_layers=renumbered(config.windowed_layers),
        no_rope_layers=renumbered(config.no_rope_layers),
    )


def _top(usage: torch.Tensor, count: int) -> list[int]:
    """Return the numbers of the `count` most used, in order."""
    return sorted(usage.topk(count).indices.tolist())


def _add(sums: dict[_Key, torch.Tensor], key: _Key, value: torch.Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
