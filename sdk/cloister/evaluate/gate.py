"""Bounds that a bundle must keep to be written."""

from __future__ import annotations

import math
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
_BOUND = re.compile(r"\s*([a-z0-9_.]+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a metric must be at most, or at least."""

    metric: str
    kind: str  # <= or >=
    value: float

    @property
    def between_two(self) -> bool:
        """Whether the metric compares a model with another."""
        return self.metric in _BETWEEN_TWO


def parse(text: str) -> tuple[Bound, ...]:
    """Bounds out of a text such as `mean_kld<=0.02,top1>=0.95`.

    Raises:
        SettingError: it is not of that form.
    """
    bounds = []
    for part in text.split(","):
        found = _BOUND.fullmatch(part)
        try:
            value = float(found[3]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or math.isnan(value):
            raise SettingError(
                "A gate is a list of bounds such as mean_kld<=0.02,top1>=0.95; correct it."
            )
        bounds.append(Bound(metric=found[1], kind=found[2], value=value))
    return tuple(bounds)


def check(bounds: Iterable[Bound], metrics: Mapping[str, float]) -> None:
    """Raise unless every bound is kept.

    Raises:
        GateFailed: one is not kept.
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
