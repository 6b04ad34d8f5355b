"""The models under evaluation: a checkpoint in eager mode, or a bundle through its program.

Where prompts have pictures or recordings, `media` are those of each prompt: every MEDIA among its
ids is one of their vectors.

Shapes: N positions of an answer, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

import torch

from cloister import family
from cloister.bundle import Bundle
from cloister.errors import SettingError
from cloister.model.checkpoint import Checkpoint
from cloister.model.device import device
from cloister.model.generate import generate as generate_eagerly
from cloister.model.senses import Senses
from cloister.parts import Picture, Recording
from cloister.runtime.chat import Sampling
from cloister.runtime.engine import Engine
from cloister.runtime.generate import Decoding, generate, score
from cloister.runtime.sampling import Sampler
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from cloister.pairs import Pair
    from cloister.pieces import MediaFormats

__all__ = ["BundleSubject", "CheckpointSubject", "Media", "Subject", "open_subject"]

Media = Sequence[Sequence[Picture | Recording]]

_BATCH_BYTES = 256 << 20  # of logits at a time


class Subject(Protocol):
    """A model under evaluation."""

    name: str
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    context: int
    vocabulary: int
    formats: MediaFormats | None  # None: it reads text only

    def logits(self, pairs: Iterable[Pair], media: Media = ()) -> Iterator[torch.Tensor]:
        """Yield the logits that predict the tokens of each pair's answer, float32[N, V]."""

    def answers(
        self, prompts: Sequence[list[int]], limit: int, media: Media = ()
    ) -> Iterator[list[int]]:
        """Yield the greedy answer to each prompt, in order, without its end token."""


class CheckpointSubject:
    """A checkpoint, quantized or not, in eager mode."""

    def __init__(self, checkpoint: Checkpoint, *, batch_bytes: int = _BATCH_BYTES) -> None:
        metadata = checkpoint.metadata
        self.name = checkpoint.path.name
        self.tokenizer = Tokenizer.from_files(
            checkpoint.tokenizer_path, checkpoint.template_path, metadata)
        self.eos, self.context = metadata.eos, metadata.config.shape.context
        self.vocabulary = metadata.config.shape.vocab_size
        self._batch_bytes = batch_bytes
        self._decoder = checkpoint.load().to(device())
        self.formats, self._checkpoint = metadata.media, checkpoint

    @cached_property
    def _senses(self) -> Senses:
        return Senses(self._checkpoint, self._decoder.cpu())

    @torch.no_grad()
    def logits(self, pairs: Iterable[Pair], media: Media = ()) -> Iterator[torch.Tensor]:
        """Yield the logits of each answer, see `Subject`."""
        if media:
            for (prompt, answer), parts in zip(pairs, media, strict=True):
                yield self._senses.logits([*prompt, *answer[:-1]], parts, len(prompt) - 1)
            return
        group: list[Pair] = []
        for pair in pairs:
            longest = max(len(prompt) + len(answer) for prompt, answer in [*group, pair])
            if group and longest * (len(group) + 1) * self.vocabulary * 4 > self._batch_bytes:
                yield from self._group(group)
                group = []
            group.append(pair)
        yield from self._group(group)

    def _group(self, group: list[Pair]) -> Iterator[torch.Tensor]:
        if not group:
            return
        tokens_BT = torch.zeros(
            len(group), max(len(prompt) + len(answer) for prompt, answer in group),
            dtype=torch.int64)
        for row, (prompt, answer) in zip(tokens_BT, group, strict=True):
            row[:len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        # What follows a row changes nothing in it.
        logits_BTV = self._decoder(tokens_BT.to(device())).float().cpu()
        for rows, (prompt, answer) in zip(logits_BTV, group, strict=True):
            yield rows[len(prompt) - 1:len(prompt) + len(answer) - 1]

    def answers(
        self, prompts: Sequence[list[int]], limit: int, media: Media = ()
    ) -> Iterator[list[int]]:
        """Yield greedy answers, see `Subject`."""
        if media:
            for prompt, parts in zip(prompts, media, strict=True):
                yield self._senses.answer(prompt, parts, end=self.eos, limit=limit)
            return
        yield from generate_eagerly(self._decoder, prompts, end=self.eos, limit=limit)


class BundleSubject:
    """A bundle, through the program that it ships."""

    def __init__(self, path: Path) -> None:
        self._engine = Engine(path)
        manifest = self._engine.bundle.manifest
        self.name, self.tokenizer = path.name, self._engine.tokenizer
        self.eos, self.context = manifest.eos, manifest.context
        self.vocabulary, self.formats = manifest.shape.vocab_size, manifest.media

    def logits(self, pairs: Iterable[Pair], media: Media = ()) -> Iterator[torch.Tensor]:
        """Yield the logits of each answer, see `Subject`."""
        for (prompt, answer), parts in zip(pairs, media or repeat(()), strict=False):
            read = self._engine.positions(prompt, parts)
            if parts:  # only text has logits at each position
                self._engine.extend(read)
            # What follows the last token is not asked for.
            yield torch.cat(list(score(self._engine, [*read, *answer[:-1]], len(read) - 1)))

    def answers(
        self, prompts: Sequence[list[int]], limit: int, media: Media = ()
    ) -> Iterator[list[int]]:
        """Yield greedy answers, see `Subject`."""
        decoding = Decoding(sampler=Sampler(Sampling()), end=self.eos, limit=limit)
        for prompt, parts in zip(prompts, media or repeat(()), strict=False):
            read = self._engine.positions(prompt, parts)
            room = len(read) < self.context
            ids = [choice.id for choice in generate(self._engine, read, decoding)] if room else []
            yield ids[:-1] if ids and ids[-1] in self.eos else ids


def open_subject(model: str | Path | Bundle | Checkpoint) -> Subject:
    """Load a bundle or checkpoint, or the one at a path, for evaluation.

    Raises:
        SettingError: it is neither.
        BundleError, CheckpointError: it is one, and cannot be used.
    """
    if isinstance(model, Checkpoint):
        return CheckpointSubject(model)
    path = model.path if isinstance(model, Bundle) else family.find(model)
    if (path / "manifest.json").exists():
        return BundleSubject(path)
    if (path / "config.json").exists():
        return CheckpointSubject(Checkpoint.open(path))
    raise SettingError(
        f"{path.name} is neither a bundle nor a checkpoint; name a directory that is one."
    )
