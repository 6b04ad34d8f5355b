"""Files from which a run goes on: whole, or as they were before."""

from __future__ import annotations

import errno
import os
import pickle
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cloister.errors import NotEnoughDisk, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["make_folder", "read_state", "write_state", "writing"]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What happens to a run's file while it is written, by our names.

    Raises:
        NotEnoughDisk: the disk is full.
        TrainingError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NotEnoughDisk(
                f"The disk filled while {path.name} was written; make room and run again to go on."
            ) from None
        raise TrainingError(
            f"{path.name} cannot be written ({error.strerror}); check its folder."
        ) from None


def make_folder(path: Path) -> Path:
    """`path`, which is a folder then.

    Raises:
        NotEnoughDisk, TrainingError: see `writing`.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_state(path: Path, held: dict[str, Any]) -> None:
    """Write `held`, tensors and plain values, beside `path` and rename it there.

    Raises:
        NotEnoughDisk, TrainingError: see `writing`; what stood at `path` still does.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            with part.open("wb") as file:
                try:
                    torch.save(held, file)
                except RuntimeError:  # what torch makes of a write that failed
                    raise OSError(errno.ENOSPC, "") from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)  # noqa: PTH105  # the atomic one, by its name
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
