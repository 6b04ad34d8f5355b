"""The one place that reads the environment and finds directories."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where things are kept."""

    home: Path  # user data: CLOISTER_HOME, else where the platform keeps it
    data: Path | None  # public data sets: CLOISTER_DATA

    @classmethod
    def from_environment(cls) -> Settings:
        """Read CLOISTER_HOME and CLOISTER_DATA now."""
        home, data = os.environ.get("CLOISTER_HOME"), os.environ.get("CLOISTER_DATA")
        return cls(
            home=Path(home) if home else platformdirs.user_data_path("cloister", appauthor=False),
            data=Path(data) if data else None,
        )

    @property
    def seen_programs(self) -> Path:
        """Hashes of programs that this machine has checked before."""
        return self.home / "programs.json"
