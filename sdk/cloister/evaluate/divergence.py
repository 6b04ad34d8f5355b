"""How far one model's next-token distribution lies from another's, on the same text.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Divergence", "compare"]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Divergence of a candidate from a reference over `n` positions."""

    n: int
    mean_kld: float  # nats a token, KL(reference || candidate)
    mean_kld_se: float  # standard error of the mean
    median_kld: float
    p99_kld: float
    max_kld: float
    top1: float  # share of positions with the same most likely token
    relative_error: float  # norm of the logit difference over the norm of the reference's logits

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready."""
        return dict(vars(self))


def compare(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Divergence:
    """Divergence over pairs of logits (reference, candidate), float32[T, V] each.

    Pairs are consumed one by one, so that the logits of a whole text are never held at once.
    """
    klds, same = [], 0
    difference = norm = 0.0
    for reference, candidate in pairs:
        log_p, log_q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
        klds.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        difference += float((reference.double() - candidate.double()).square().sum())
        norm += float(reference.double().square().sum())
    kld = torch.cat(klds)
    n = kld.numel()
    return Divergence(
        n=n,
        mean_kld=float(kld.mean()),
        mean_kld_se=float(kld.std() / n**0.5) if n > 1 else 0.0,
        median_kld=float(kld.median()),
        p99_kld=float(kld.quantile(0.99)),
        max_kld=float(kld.max()),
        top1=same / n,
        relative_error=(difference / norm) ** 0.5 if norm else 0.0,
    )
