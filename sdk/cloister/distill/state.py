"""The state that a run resumes from: whole, or as it was before.

    FOLDER/NNNNNNNN/run.json         what was done in N steps
    FOLDER/NNNNNNNN/*.safetensors    weights and optimizer state, a part of each from each process

Written by torch.distributed.checkpoint, and read by any number of processes; nothing is unpickled.
"""

from __future__ import annotations

import shutil
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cloister.errors import TrainingError
from cloister.files import disk_errors, sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

    from cloister.distill.parallel import Parallel

__all__ = ["Record", "load_state", "make_folder", "read_record", "save_state"]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The progress of a run, and its identity, without which it does not resume."""

    identity: str  # of settings, data and models
    phase: tuple[float, bool]  # learning rate of the last step; whether on the student's answers
    losses: list[float]  # one a step
    seconds: float
    tokens: int


def make_folder(path: Path) -> Path:
    """Make the folder `path`, if it is not there.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`.
    """
    with disk_errors(path.name):
        path.mkdir(parents=True, exist_ok=True)
    return path


def save_state(
    folder: Path, record: Record, tensors: Mapping[str, torch.Tensor], parallel: Parallel
) -> None:
    """Write the state beside the older one in `folder`, then remove that; every process calls it.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`; the older state stays.
    """
    part, whole = folder / "part", folder / f"{len(record.losses):08}"
    if parallel.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        make_folder(part)
    parallel.wait()
    # A file for each layer: what goes to one is copied before it is written.
    places = {name: ".".join(name.split(".")[1:3]) for name in tensors}
    numbers = {place: number for number, place in enumerate(dict.fromkeys(places.values()), 1)}
    storage = HuggingFaceStorageWriter(
        str(part), save_distributed=True,
        fqn_to_index_mapping={name: numbers[place] for name, place in places.items()})
    try:
        with disk_errors(folder.name), _quiet():
            try:
                save(dict(tensors), storage_writer=storage, no_dist=parallel.world == 1)
            except CheckpointException as error:
                raise _cause(error) from error
            if parallel.rank == 0:
                (part / "run.json").write_bytes(msgspec.json.encode(record))
                sync(part / "run.json")
                sync(part)
                part.rename(whole)
                sync(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if parallel.rank == 0:
        for other in set(_states(folder)) - {whole}:
            shutil.rmtree(other, ignore_errors=True)
    parallel.wait()


def read_record(folder: Path) -> Record | None:
    """Read the record of the run in `folder`, or None where there is none.

    Raises:
        TrainingError: the record cannot be read.
    """
    states = _states(folder)
    if not states:
        if folder.exists() and not folder.is_dir():
            raise _damaged(folder)
        return None
    try:
        return msgspec.json.decode((states[-1] / "run.json").read_bytes(), type=Record)
    except (OSError, ValueError):
        raise _damaged(folder) from None


def load_state(folder: Path, tensors: Mapping[str, torch.Tensor], parallel: Parallel) -> None:
    """Read the newest state into `tensors`, each process its shard; every process calls it.

    Raises:
        TrainingError: the files cannot be read.
    """
    storage = HuggingFaceStorageReader(str(_states(folder)[-1]))
    try:
        with _quiet():
            load(dict(tensors), storage_reader=storage, no_dist=parallel.world == 1)
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError, RuntimeError):
        raise _damaged(folder) from None


def _states(folder: Path) -> list[Path]:
    """Return the whole states, the newest last; a kill may leave two."""
    return sorted(path for path in folder.glob("[0-9]" * 8) if path.is_dir())


def _damaged(folder: Path) -> TrainingError:
    return TrainingError(f"{folder.name} cannot be read as a run's state; delete it to begin anew.")


def _cause(error: CheckpointException) -> BaseException:
    """Return why a process could not write."""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning that there is one process only (dcp, torch 2.13)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
