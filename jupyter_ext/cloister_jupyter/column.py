"""Bundles that are asked, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister import family
from cloister.errors import SettingError
from cloister.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Column", "columns_of"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A bundle that is asked, under a name for people."""

    id: str
    name: str
    path: Path


def columns_of(tiers: Sequence[str] | None = None, bundles: Sequence[str | Path] = ()) -> (
        tuple[Column, ...]):
    """Return the columns of tiers of the shipped family and of other bundles, in that order.

    `tiers` None stands for every tier that is shipped. Whether a bundle can be used is found out
    when it is asked; where two have one name, the directory that holds them tells them apart.

    Raises:
        SettingError: there is no tier of that name, or nothing to ask.
    """
    if isinstance(tiers, str) or isinstance(bundles, str | Path):
        raise SettingError("Tiers and bundles are lists; write ['nano-1'].")
    if tiers is None:
        tiers = [tier for tier in Tier if family.bundle_path(tier).is_dir()]
    for tier in tiers:
        if tier not in list(Tier):
            raise SettingError(
                f"No tier is named {str(tier)!r}; tiers are {', '.join(Tier)}, and other bundles "
                "go into bundles=[...]."
            )
    paths = [family.bundle_path(tier) for tier in tiers] + [Path(path) for path in bundles]
    if not paths:
        raise SettingError("There is nothing to ask; name a tier or a bundle.")
    names = [str(tier) for tier in tiers] + [path.name.removesuffix(".cloister")
                                            for path in paths[len(tiers):]]
    return tuple(
        Column(
            id=str(index), path=path,
            name=name if names.count(name) == 1 or index < len(tiers)
            else f"{path.absolute().parent.name}/{name}")
        for index, (name, path) in enumerate(zip(names, paths, strict=True)))
