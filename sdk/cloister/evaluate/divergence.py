"""The divergence of one model's next-token distributions from another's, on the same text.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

import torch

from cloister.model.device import device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Divergence", "compare"]

_ROWS = 128  # positions at a time, since a large vocabulary in float64 takes a megabyte each


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Divergence of a candidate from a reference over `n` positions."""

    n: int
    mean_kld: float  # nats a token, KL(reference || candidate)
    mean_kld_se: float  # standard error of the mean; tokens of one text are not independent
    median_kld: float
    p99_kld: float
    p999_kld: float
    max_kld: float
    top1: float  # share of positions with the same most likely token
    top1_se: float
    ppl_ratio: float | None  # perplexity on the true tokens, candidate over reference
    ppl_ratio_se: float | None
    relative_error: float  # norm of the logit difference over the norm of the reference's logits
    histogram: dict[str, int] = field(default_factory=dict)  # positions by their power of ten

    def to_dict(self) -> dict[str, float | int]:
        """Return the measured figures, JSON-ready, without the histogram."""
        return {name: value for name, value in vars(self).items()
                if value is not None and name != "histogram"}


def compare(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], labels: Iterable[torch.Tensor] | None = None
) -> Divergence:
    """Return the divergence over pairs of logits (reference, candidate), float32[T, V] each.

    `labels`, int64[T] for each pair, are the true next tokens; without them there is no perplexity.
    Pairs are consumed one by one, a few positions at a time; no logits are retained.
    """
    klds, same, surprise, texts = [], [], [], []
    difference = norm = 0.0
    truths = repeat(None) if labels is None else iter(labels)
    for text, reference, candidate, truth in _parts(pairs, truths):
        texts += [text] * len(reference)
        log_p, log_q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
        klds.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(reference.argmax(-1) == candidate.argmax(-1))
        if truth is not None:
            surprise.append((log_p - log_q).gather(-1, truth[:, None])[:, 0])
        difference += float((reference.double() - candidate.double()).square().sum())
        norm += float(reference.double().square().sum())
    kld, top1, text_of = torch.cat(klds).cpu(), torch.cat(same).cpu().double(), torch.tensor(texts)
    quantiles = kld.quantile(torch.tensor([0.5, 0.99, 0.999], dtype=kld.dtype)).tolist()
    ratio = ratio_se = None
    if surprise:
        log_ratio = torch.cat(surprise).cpu()
        ratio = float(log_ratio.mean().exp())
        ratio_se = ratio * _error(log_ratio, text_of)
    return Divergence(
        n=kld.numel(), mean_kld=float(kld.mean()), mean_kld_se=_error(kld, text_of),
        median_kld=quantiles[0], p99_kld=quantiles[1], p999_kld=quantiles[2],
        max_kld=float(kld.max()), top1=float(top1.mean()), top1_se=_error(top1, text_of),
        ppl_ratio=ratio, ppl_ratio_se=ratio_se,
        relative_error=(difference / norm) ** 0.5 if norm else 0.0, histogram=_histogram(kld),
    )


def _parts(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], truths: Iterable[torch.Tensor | None]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    for text, ((reference, candidate), truth) in enumerate(zip(pairs, truths, strict=False)):
        for at in range(0, len(reference), _ROWS):
            rows = slice(at, at + _ROWS)
            yield (text, reference[rows].to(device()), candidate[rows].to(device()),
                   None if truth is None else truth[rows].to(device()))


def _histogram(kld: torch.Tensor) -> dict[str, int]:
    edges = [10.0 ** power for power in range(-8, 1)]
    names = [f"below {edges[0]:g}", *(f"{edge:g} to {10 * edge:g}" for edge in edges[:-1]),
             f"{edges[-1]:g} and above"]
    bins = torch.bucketize(kld, torch.tensor(edges, dtype=kld.dtype), right=True)
    return dict(zip(names, bins.bincount(minlength=len(names)).tolist(), strict=True))


def _error(values: torch.Tensor, text_of: torch.Tensor) -> float:
    """Return the standard error of the mean over texts; of one text, over its tokens."""
    n, texts = values.numel(), int(text_of.max()) + 1
    if texts == 1:
        return float(values.std()) / n**0.5 if n > 1 else 0.0
    off = torch.zeros(texts, dtype=values.dtype).index_add(0, text_of, values - values.mean())
    return math.sqrt(float(off.square().sum()) * texts / (texts - 1)) / n
