"""Files from which a run goes on: whole, or as they were before."""

from __future__ import annotations

import errno
import os
import pickle
from typing import TYPE_CHECKING, Any

import torch

from cloister.errors import NotEnoughDisk, TrainingError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_state", "write_state"]


def write_state(path: Path, held: dict[str, Any]) -> None:
    """Write `held`, tensors and plain values, beside `path` and rename it there.

    Raises:
        NotEnoughDisk: the disk is full; what stood at `path` still does.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)  # noqa: PTH105  # the atomic one, by its name
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDisk(
                f"The disk filled while {path.name} was written; make room and run again to go on."
            ) from None
        raise TrainingError(
            f"{path.name} cannot be written ({error.strerror}); check its folder."
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; nothing but tensors and plain values is accepted.

    Raises:
        TrainingError: the file cannot be read.
    """
    try:
        held: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise TrainingError(
            f"{path.name} cannot be read as a run's state; delete it to begin anew."
        ) from None
    return held
