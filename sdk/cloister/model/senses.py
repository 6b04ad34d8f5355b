"""What a checkpoint reads besides text, in eager mode: pictures and recordings among token ids.

Shapes: T positions, N vectors, E decoder's hidden size, V vocabulary, H rows, W columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloister.model.cache import KVCache
from cloister.model.projector import TokenProjector
from cloister.model.sense_file import SenseKind
from cloister.parts import Picture, one_by_one
from cloister.pieces import MEDIA, PictureFormat, RecordingFormat

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cloister.model.checkpoint import Checkpoint
    from cloister.model.sense import Sense
    from cloister.model.transformer import Decoder
    from cloister.parts import Recording

__all__ = ["Senses", "tensor"]


def tensor(part: Picture | Recording, form: PictureFormat | RecordingFormat) -> torch.Tensor:
    """Return what a sense reads: uint8[tiles, 3, H, W], or float32[1, 1, samples], filled up."""
    if isinstance(part, Picture):
        pixels = torch.frombuffer(bytearray(part.data), dtype=torch.uint8)
        return pixels.view(part.tiles, 3, part.height, part.width)
    assert isinstance(form, RecordingFormat)
    samples = torch.zeros(1, 1, form.padded(part.samples))
    samples[0, 0, :part.samples] = torch.frombuffer(bytearray(part.data), dtype=torch.float32)
    return samples


class Senses:
    """The senses of a checkpoint, beside its decoder."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder) -> None:
        self.formats, self._decoder = checkpoint.metadata.media, decoder
        self._senses: dict[SenseKind, Sense] = {}
        for kind, file in checkpoint.senses.items():
            sense = file.load()
            if isinstance(sense.projector, TokenProjector):
                sense.projector.read_with(decoder.embed_tokens)
            self._senses[kind] = sense

    @torch.no_grad()
    def logits(
        self, ids: Sequence[int], parts: Sequence[Picture | Recording], first: int
    ) -> torch.Tensor:
        """Return the logits after each of `ids` from number `first` on, float32[N, V].

        Every MEDIA among them is a vector of `parts`, in their order.
        """
        count = len(ids) - first
        rows_1TE = self._hidden(ids, parts, KVCache(self._decoder.config))[:, -count:]
        return self._decoder.logits(rows_1TE)[0].float()

    @torch.no_grad()
    def answer(
        self, ids: Sequence[int], parts: Sequence[Picture | Recording], *, end: Collection[int],
        limit: int
    ) -> list[int]:
        """Return the greedy answer, without the token of `end` that closed it."""
        decoder, said = self._decoder, list[int]()
        cache = KVCache(decoder.config)
        if len(ids) >= decoder.config.shape.context:
            return said
        rows_1TE = self._hidden(ids, parts, cache)
        while len(said) < limit:
            token = int(decoder.logits(rows_1TE[:, -1:]).argmax())
            if token in end:
                break
            said.append(token)
            if cache.start == decoder.config.shape.context:
                break
            rows_1TE = decoder.hidden(torch.tensor([[token]]), cache.start, cache)
            cache.advance(1)
        return said

    def _hidden(
        self, ids: Sequence[int], parts: Sequence[Picture | Recording], cache: KVCache
    ) -> torch.Tensor:
        """Read `ids`, and return their hidden states, [1, T, E]."""
        assert self.formats is not None
        vectors: list[torch.Tensor | None] = []  # None: one that the encoder leaves out
        blocks = list[int]()  # of each vector: those that attend to one another
        for number, part in enumerate(one_by_one(parts)):
            form = self.formats.of(part)
            kind = SenseKind.VISION if isinstance(part, Picture) else SenseKind.AUDIO
            each_NE = list(self._senses[kind](tensor(part, form)).flatten(0, 1))
            most = self.formats.vectors(part)
            both = isinstance(form, PictureFormat) and form.both_ways
            vectors += [*each_NE, *[None] * (most - len(each_NE))]
            blocks += [number if both else -1] * most
        found, block = iter(vectors), iter(blocks)
        rows, blocks_T = list[torch.Tensor](), list[int]()
        embedded_TE = self._decoder.embed_tokens(
            torch.tensor([0 if id_ == MEDIA else id_ for id_ in ids]))
        for id_, row_E in zip(ids, embedded_TE, strict=True):
            vector, run = (next(found), next(block)) if id_ == MEDIA else (row_E, -1)
            if vector is not None:
                rows.append(vector)
                blocks_T.append(run)
        cache.blocks_T = torch.tensor(blocks_T) if max(blocks, default=-1) >= 0 else None
        hidden_1TE = self._decoder.hidden_from(torch.stack(rows).unsqueeze(0), 0, cache)
        cache.advance(len(rows))
        cache.blocks_T = None
        return hidden_1TE
