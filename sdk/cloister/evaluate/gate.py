"""Bounds that a bundle must meet to be written."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from cloister.errors import GateFailed, SettingError
from cloister.evaluate.divergence import Divergence

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Bound", "check", "parse"]

_BETWEEN_TWO = {field.name for field in fields(Divergence)} | {"flips"}

_OPERATORS = {"<=": operator.le, ">=": operator.ge}
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_BOUND = re.compile(rf"\s*([a-z0-9_.]+)\s*(<=|>=)\s*({_NUMBER})\s*")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The most, or the least, that a metric may be."""

    metric: str
    kind: str  # <= or >=
    value: float

    @property
    def between_two(self) -> bool:
        """Whether the metric compares a model with another."""
        return self.metric in _BETWEEN_TWO


def parse(text: str) -> tuple[Bound, ...]:
    """Parse bounds such as `mean_kld<=0.02,top1>=0.95`.

    Raises:
        SettingError: it is not of that form.
    """
    bounds = []
    for part in text.split(","):
        match = _BOUND.fullmatch(part)
        if match is None:
            raise SettingError(
                "A gate is a list of bounds such as mean_kld<=0.02,top1>=0.95; correct it."
            )
        bounds.append(Bound(metric=match[1], kind=match[2], value=float(match[3])))
    return tuple(bounds)


def check(bounds: Iterable[Bound], metrics: Mapping[str, float]) -> None:
    """Raise GateFailed unless every bound holds.

    Raises:
        SettingError: a metric was not measured.
    """
    for bound in bounds:
        if bound.metric not in metrics:
            raise SettingError(
                f"{bound.metric} is not measured here; choose of {', '.join(sorted(metrics))}."
            )
        value = metrics[bound.metric]
        if not _OPERATORS[bound.kind](value, bound.value):
            raise GateFailed(
                f"{bound.metric} is {value:.4g}, and the gate asks for {bound.kind} "
                f"{bound.value:g}; nothing was written."
            )
