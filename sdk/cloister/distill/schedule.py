"""The settings of training: steps, learning rate, objective, phases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from cloister.distill.data import one_pass
from cloister.distill.losses import Divergence, Objective
from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.pairs import Pair

__all__ = ["Kind", "OnPolicy", "Schedule", "TrainSettings"]


class Kind(StrEnum):
    """The optimizer of the blocks' matrices; AdamW updates all else."""

    MUON = "muon"  # orthogonalised momentum (arXiv 2502.16982)
    ADAMW = "adamw"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run and its learning rate.

    Raises:
        SettingError: a value outside its bound.
    """

    steps: int | None = None  # None: as many as `passes` over the data take
    passes: float = 3.0
    tokens: int = 4096  # positions a step, over all processes
    micro: int = 1024  # positions at a time, of which a step has several
    optimizer: Kind = Kind.MUON
    peak: float = 4e-3  # learning rate
    warmup: int = 50  # steps
    decay: float = 0.4  # share of the steps, the last ones
    final: float = 0.02  # share of the peak at which the decay ends
    weight_decay: float = 0.05
    dropout: float = 0.0  # share of each block's outputs
    clip: float = 1.0  # norm of the gradient
    autocast: bool = True  # products in bfloat16, on a device that has them
    seed: int = 0
    save_every: int = 100  # steps

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise SettingError(f"steps is {self.steps}; it must be at least 1.")
        for name, least in (("tokens", 1), ("micro", 1), ("save_every", 1),
                            ("warmup", 0), ("weight_decay", 0), ("final", 0), ("decay", 0),
                            ("dropout", 0)):
            if not getattr(self, name) >= least:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingError(f"seed is {self.seed}; it must be a number of 64 bits.")
        for name in ("passes", "peak", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("dropout", "decay", "final"):
            if not getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be at most 1.")

    def planned(self, data: Sequence[Pair], context: int) -> Schedule:
        """Return the schedule with the steps that `passes` over `data` take, see `one_pass`."""
        if self.steps is not None:
            return self
        batches = len(one_pass(data, self.micro, self.seed, context))
        steps = max(1, round(self.passes * batches / self.batches))
        return replace(self, steps=steps, warmup=min(self.warmup, steps // 10))

    @property
    def batches(self) -> int:
        """Batches of `micro` positions in a step."""
        return max(1, self.tokens // self.micro)

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`: linear warm-up, peak, linear decay to `final`."""
        assert self.steps is not None, "the schedule is not planned"
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.peak * (self.final + (1 - self.final) * min(1.0, left))


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """A last phase on answers that the student itself samples (GKD, arXiv 2306.13649).

    Raises:
        SettingError: a value outside its bound.
    """

    share: float = 0.1  # of the steps
    objective: Objective = field(default_factory=lambda: Objective(
        hard=0.0, divergence=Divergence.JENSEN_SHANNON
    ))
    temperature: float = 1.0  # of the sampling
    limit: int = 96  # tokens of an answer

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SettingError(f"share is {self.share}; it must lie above 0 and up to 1.")
        if self.objective.hard:
            raise SettingError("A student's own answers are no labels; set hard to 0.")
        if self.limit < 1:
            raise SettingError(f"limit is {self.limit}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a training run."""

    schedule: Schedule = field(default_factory=Schedule)
    objective: Objective = field(default_factory=Objective)
    on_policy: OnPolicy | None = None
    compiled: bool = False  # faster steps after a minute of compilation, on one process
