"""The losses of distillation, a bounded number of rows at a time.

Shapes: N positions to be learnt, D hidden size, V vocabulary, K draws of a teacher.

All are sums over positions, in nats; the caller divides by their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.distill.teacher import Draws

__all__ = [
    "Divergence", "Objective", "chunk_rows", "chunked", "divergence", "forward_kl",
    "jensen_shannon", "reverse_kl", "sampled_cross_entropy",
]

CHUNK_BYTES = 128 << 20  # of the float32 logits that are in memory at a time


class Divergence(StrEnum):
    """The divergence of a student from its teacher."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JENSEN_SHANNON = "js"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`hard` times cross-entropy on the labels and the rest times a divergence from the teacher.

    Raises:
        SettingError: a value outside its bound.
    """

    hard: float = 0.5  # 1: no teacher is asked
    divergence: Divergence = Divergence.FORWARD_KL
    temperature: float = 1.0  # of both; the divergence is multiplied by its square

    def __post_init__(self) -> None:
        if not 0 <= self.hard <= 1:
            raise SettingError(f"hard is {self.hard}; it must lie between 0 and 1.")
        if not 0 < self.temperature <= 100:
            raise SettingError(
                f"temperature is {self.temperature}; it must lie above 0 and up to 100."
            )


def forward_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) of log-probabilities."""
    return functional.kl_div(student_NV, teacher_NV, log_target=True, reduction="sum")


def reverse_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """Return KL(student || teacher) of log-probabilities."""
    return functional.kl_div(teacher_NV, student_NV, log_target=True, reduction="sum")


def jensen_shannon(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence of both from their mixture, of log-probabilities."""
    half = torch.logaddexp(student_NV, teacher_NV) - 0.6931471805599453
    return 0.5 * (forward_kl(half, student_NV) + forward_kl(half, teacher_NV))


_DIVERGENCES = {
    Divergence.FORWARD_KL: forward_kl,
    Divergence.REVERSE_KL: reverse_kl,
    Divergence.JENSEN_SHANNON: jensen_shannon,
}


def divergence(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """Return the divergence of log-probabilities from the teacher's logits.

    Each is softened by the objective's temperature; the result is multiplied by its square.
    """
    temperature = objective.temperature
    student = student_NV if temperature == 1 else (student_NV / temperature).log_softmax(-1)
    teacher = (teacher_NV / temperature).log_softmax(-1)
    divergence: torch.Tensor = _DIVERGENCES[objective.divergence](student, teacher)
    return divergence * temperature**2


def sampled_cross_entropy(student_NV: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Return the cross-entropy of the student's log-probabilities against a teacher's draws.

    Its expectation over the draws is the forward KL divergence plus the teacher's entropy, which
    has no gradient (arXiv 2503.16870).
    """
    picked = student_NV.gather(-1, draws.ids)
    return torch.neg((picked * draws.weights).sum())


def chunk_rows(vocabulary: int) -> int:
    """Return the number of positions whose logits are in memory at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def chunked(
    rows: Callable[[slice], tuple[torch.Tensor, torch.Tensor]], count: int, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of `rows(part)`, a pair of losses, over slices of `count` positions.

    With more than one slice, its logits are computed again for the gradient, so that no
    two slices' logits exist at a time.
    """
    size = chunk_rows(vocabulary)
    if count <= size:
        return rows(slice(0, count))
    parts = [
        checkpoint(rows, slice(start, start + size), use_reentrant=False)
        for start in range(0, count, size)
    ]
    first, second = zip(*parts, strict=True)
    return torch.stack(first).sum(), torch.stack(second).sum()
