"""Text and media in one sequence, in eager mode: the reference of imports and exports.

Shapes: T positions, M of them vectors of media, E decoder's hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloister.model.cache import KVCache
from cloister.pieces import MEDIA

if TYPE_CHECKING:
    from cloister.model.transformer import Decoder

__all__ = ["embed", "logits", "runs"]


def embed(decoder: Decoder, tokens_1T: torch.Tensor, vectors_ME: torch.Tensor) -> torch.Tensor:
    """Return what the first layer reads, [1, T, E]: at each `MEDIA` the next of the vectors."""
    media_1T = tokens_1T == MEDIA
    assert int(media_1T.sum()) == len(vectors_ME), "as many vectors as places for them"
    x_1TE = decoder.embed_tokens(tokens_1T.masked_fill(media_1T, 0))
    x_1TE[media_1T] = vectors_ME.to(x_1TE.dtype)
    return x_1TE


def runs(tokens_1T: torch.Tensor) -> torch.Tensor:
    """Return the number of the run of `MEDIA` that a position is in, or -1, int64[T]."""
    media_T = tokens_1T[0] == MEDIA
    begins_T = media_T & ~media_T.roll(1)
    begins_T[0] = media_T[0]
    return torch.where(media_T, begins_T.cumsum(0) - 1, -1)


def logits(
    decoder: Decoder, tokens_1T: torch.Tensor, vectors_ME: torch.Tensor,
    cache: KVCache | None = None, *, both_ways: bool = False
) -> torch.Tensor:
    """Return logits after each position, [1, T, V].

    With `both_ways` the vectors of a run attend to one another in both directions, in layers with a
    window within it (Gemma 3); a run is given whole.
    """
    cache = KVCache(decoder.config) if cache is None else cache
    cache.blocks_T = runs(tokens_1T) if both_ways else None
    x_1TE = embed(decoder, tokens_1T, vectors_ME)
    x_1TE = decoder.hidden_from(x_1TE, cache.start, cache)
    cache.advance(tokens_1T.shape[1])
    return decoder.logits(x_1TE)
