"""From logits to the next token.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from cloister.errors import ConstraintError, IncompatibleProgram, SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.runtime.chat import Sampling

__all__ = ["Choice", "Constraint", "Sampler"]


@dataclass(frozen=True)
class Choice:
    """A chosen token, with its log-probability under the model's own distribution, in nats."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most likely ids with their log-probabilities
    rank: int  # 1 = the most likely; 0 where `top` is empty


class Constraint(Protocol):
    """Decides which tokens may come next."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end."""
        ...

    def allowed(self) -> torch.Tensor:
        """Mask of the next token, bool[V]; the end tokens are True where the answer may end."""
        ...

    def permits(self, id_: int) -> bool:
        """Whether `id_` may come next: much sooner known than `allowed`."""
        ...

    def permitted(self, ids: Sequence[int]) -> int:
        """Count those of `ids`, from the front, that may come one after the other."""
        ...

    def forced(self) -> Sequence[int]:
        """Return a spelling of the text that has to come; there may be others, or it is empty."""
        ...

    def accept(self, id_: int) -> None:
        """Go on after the token `id_`, which was allowed."""
        ...


class Sampler:
    """Chooses tokens; the same seed and the same logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._rng = torch.Generator()
        if sampling.seed is None:
            self._rng.seed()
        else:
            self._rng.manual_seed(sampling.seed)

    def choose(
        self, logits_V: torch.Tensor, seen: Sequence[int], *, top: int = 0,
        constraint: Constraint | None = None, forced: int | None = None,
    ) -> Choice:
        """Choose the next token after those `seen`, and tell the `top` most likely ones.

        Only tokens that `constraint` allows are chosen; log-probabilities are the model's own,
        without it. With `forced` that token is told in place of the one that is chosen: what is
        drawn later is what would have been drawn.

        Raises:
            SettingError: `top` is not between 0 and the vocabulary.
            ConstraintError: `constraint` does not allow `forced`.
            IncompatibleProgram: the best logit is no finite number.
        """
        if not 0 <= top <= logits_V.numel():
            raise SettingError(f"top is {top}; it must be from 0 to {logits_V.numel()}.")
        if not math.isfinite(float(logits_V.max())):  # a NaN anywhere is the maximum
            raise IncompatibleProgram(
                "The program gave logits that are not finite numbers; export the bundle again."
            )
        logprobs = logits_V.log_softmax(-1)
        id_ = -1
        if constraint is None or self.sampling.temperature == 0:
            id_ = self._choose(logits_V, seen)
        # Greedily, what is best of all is best of what is allowed; a draw has to be from the mask.
        if constraint is not None and (id_ < 0 or not constraint.permits(id_)):
            id_ = self._choose(torch.where(constraint.allowed(), logits_V, -torch.inf), seen)
        if forced is not None:
            if constraint is not None and not constraint.permits(forced):
                raise ConstraintError(
                    "The forced beginning breaks the constraint; leave one of them out.")
            id_ = forced
        best = logprobs.topk(top)
        return Choice(
            id_, float(logprobs[id_]),
            tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
            _rank(logits_V, id_, best.indices) if top else 0,
        )

    def _choose(self, logits_V: torch.Tensor, seen: Sequence[int]) -> int:
        s = self.sampling
        if s.repetition_penalty != 1.0 and seen:
            logits_V = logits_V.clone()
            ids = torch.tensor(sorted(set(seen)))
            before, penalty = logits_V[ids], s.repetition_penalty
            logits_V[ids] = torch.where(before > 0, before / penalty, before * penalty)
        if s.temperature == 0:
            return int(logits_V.argmax())  # of equal ones, the first
        # Sorted, so that every filter keeps a head of the list; a stable sort keeps ties by id.
        # Against the best, which so stays finite at the lowest temperature that float32 can hold.
        scaled_V = (logits_V - logits_V.max()) / max(s.temperature, 1e-30)
        ordered, ids = scaled_V.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        keep = torch.ones_like(probabilities, dtype=torch.bool)
        if s.top_k:
            keep[s.top_k:] = False
        # A token stays if the ones before it do not reach top_p yet: the first always does.
        keep &= probabilities.cumsum(-1) - probabilities < s.top_p
        keep &= probabilities >= s.min_p * probabilities[0]
        drawn = torch.multinomial(probabilities * keep, 1, generator=self._rng)
        return int(ids[drawn])


def _rank(logits_V: torch.Tensor, id_: int, best: torch.Tensor) -> int:
    """Count the tokens that greedy decoding would prefer, and the token itself."""
    if id_ == int(best[0]):
        return 1
    own = logits_V[id_]
    return 1 + int((logits_V > own).sum()) + int((logits_V[:id_] == own).sum())
