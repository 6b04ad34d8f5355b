"""How much of a cache is kept, and how long."""

from __future__ import annotations

from dataclasses import dataclass

from cloister.errors import SettingError

__all__ = ["Retention"]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Bounds of one kind of a namespace; None is no bound.

    Raises:
        SettingError: a bound below 0.
    """

    most_bytes: int | None = None  # on disk; what was used least recently goes first
    hours: int | None = None  # since it was written

    def __post_init__(self) -> None:
        for name in ("most_bytes", "hours"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingError(f"{name} is {value}; it must be at least 0.")
