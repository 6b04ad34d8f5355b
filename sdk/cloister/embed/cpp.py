"""The constants of a bundle for glue/cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cloister.embed.facts import Facts, ModelFile

__all__ = ["MODEL", "constants", "files"]

MODEL = "model"  # where the bundle's files go


def files(facts: Facts) -> Sequence[ModelFile]:
    """Return which files of the bundle the app has."""
    return (facts.program, facts.tokenizer)


def constants(facts: Facts) -> Mapping[str, str]:
    """Return what the glue must know of the bundle, as source files by their paths."""
    raise NotImplementedError
