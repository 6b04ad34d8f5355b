"""From logits to the next token.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cloister.errors import IncompatibleProgram, SettingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import UnionType

__all__ = ["Choice", "Sampler", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    Filters apply in the order of the fields. Greedy decoding breaks ties by the lowest id.

    Raises:
        SettingError: a value outside its bound.
    """

    repetition_penalty: float = 1.0  # above 0; divides positive logits of tokens seen (1 = off)
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # most likely tokens kept (0 = all)
    top_p: float = 1.0  # in (0, 1]; smallest set with this probability (arXiv 1904.09751)
    min_p: float = 0.0  # in [0, 1); share of the best token's probability (arXiv 2407.01082)
    seed: int | None = None  # None: drawn from the operating system

    def __post_init__(self) -> None:
        for name, (kind, good, bound) in _BOUNDS.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            right_kind = isinstance(value, kind)
            if not right_kind or not math.isfinite(value) or not good(value):
                raise SettingError(f"{name} is {value}; it must be {bound}.")


_BOUNDS: dict[str, tuple[type | UnionType, Callable[[float], bool], str]] = {
    "repetition_penalty": (float | int, lambda value: value > 0, "a number above 0"),
    "temperature": (float | int, lambda value: value >= 0, "a number of at least 0"),
    "top_k": (int, lambda value: value >= 0, "a whole number of at least 0"),
    "top_p": (float | int, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "min_p": (float | int, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "seed": (int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"),
}


@dataclass(frozen=True)
class Choice:
    """A chosen token, with its log-probability under the model's own distribution, in nats."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most likely ids with their log-probabilities


class Sampler:
    """Chooses tokens; the same seed and the same logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits_V: torch.Tensor, seen: list[int], *, top: int = 0) -> Choice:
        """The next token after those `seen`, and the `top` most likely ones.

        Raises:
            SettingError: `top` is not between 0 and the vocabulary.
            IncompatibleProgram: the best logit is no finite number.
        """
        if not 0 <= top <= logits_V.numel():
            raise SettingError(f"top is {top}; it must be from 0 to {logits_V.numel()}.")
        if not torch.isfinite(logits_V.max()):  # a NaN anywhere is the maximum
            raise IncompatibleProgram(
                "The program gave logits that are not finite numbers; export the bundle again."
            )
        logprobs = logits_V.log_softmax(-1)
        id_ = self._choose(logits_V, seen)
        best = logprobs.topk(top)
        return Choice(
            id_, float(logprobs[id_]),
            tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )

    def _choose(self, logits_V: torch.Tensor, seen: list[int]) -> int:
        s = self.sampling
        if s.repetition_penalty != 1.0 and seen:
            logits_V = logits_V.clone()
            ids = torch.tensor(sorted(set(seen)))
            held = logits_V[ids]
            penalty = s.repetition_penalty
            logits_V[ids] = torch.where(held > 0, held / penalty, held * penalty)
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
        drawn = torch.multinomial(probabilities * keep, 1, generator=self._generator)
        return int(ids[drawn])
