"""The shipped family: where its bundles and checkpoints lie, and what a tier's name stands for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from cloister.errors import SettingError
from cloister.tiers import Scale, Tier

__all__ = [
    "bundle", "bundle_path", "checkpoint", "checkpoint_path", "find", "find_checkpoint",
]


def bundle(name: str | Path) -> Path:
    """The directory `name`; where there is none and it is a tier's name, the shipped bundle."""
    path = Path(name)
    return path if path.exists() or name not in list(Tier) else bundle_path(str(name))


def checkpoint(name: str | Path) -> Path:
    """The directory `name`; where there is none and it is a tier's name, the shipped checkpoint."""
    path = Path(name)
    return path if path.exists() or name not in list(Tier) else checkpoint_path(str(name))


def bundle_path(tier: str, family: Path | None = None) -> Path:
    """Where the bundle of `tier` lies, in the package or in the directory `family`."""
    return (family or _directory() / "family") / f"{tier}.cloister"


def checkpoint_path(tier: str) -> Path:
    """Where the unquantized checkpoint of `tier` lies."""
    return _directory() / "checkpoints" / tier


def find(name: str | Path, family: Path | None = None) -> Path:
    """The bundle or checkpoint called `name`: a directory, or the bundle of a tier of the family.

    Raises:
        SettingError: neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in list(Tier):
        path = bundle_path(name, family)
        if path.is_dir():
            return path
        raise SettingError(
            f"The family has no {name} (at {Scale.REFERENCE} size); name a bundle instead."
        )
    raise SettingError(
        f"No bundle or tier is named {Path(name).name!r}; tiers are {', '.join(Tier)}."
    )


def find_checkpoint(name: str | Path) -> Path:
    """The checkpoint at `name`, or the one of that tier which the package ships.

    Raises:
        SettingError: neither.
    """
    path = checkpoint(name)
    if not path.is_dir():
        raise SettingError(f"No checkpoint is named {path.name!r}; name a directory of one.")
    return path


def _directory() -> Path:
    return Path(str(resources.files("cloister") / "reference"))
