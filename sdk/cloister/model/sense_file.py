"""The file of a sense: its weights, and its configuration in the header.

Of a checkpoint it is `vision.safetensors` or `audio.safetensors`. It stands for itself, so an
encoder is trained once and its file shared; without a projector it is one that no decoder reads
yet. A quantized tensor `NAME` is stored as `NAME.q` and `NAME.scale`, as in the checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from cloister import records
from cloister.errors import CheckpointError, NonFiniteTensor, TensorMismatch
from cloister.files import whole_file
from cloister.model.sense import Sense, SenseConfig
from cloister.model.tensor_file import TYPE_NAMES, Plan, TensorFile, opened
from cloister.pieces import PictureFormat, RecordingFormat
from cloister.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = ["SenseFile", "SenseKind", "carried", "fits", "plan", "save", "write"]

FORMAT = 1
_LIMIT = 1 << 16  # bytes of the configuration


class SenseKind(StrEnum):
    """The two senses."""

    VISION = "vision"
    AUDIO = "audio"

    @property
    def file(self) -> str:
        """Name of its file in a checkpoint."""
        return f"{self}.safetensors"


class _Header(Record, frozen=True):
    format: int
    sense: SenseConfig


class SenseFile:
    """A sense on disk, its header read and checked, its weights not read yet."""

    def __init__(self, path: Path, config: SenseConfig) -> None:
        self.path, self.config = path, config

    def __repr__(self) -> str:
        return f"SenseFile({self.path.name!r})"

    @classmethod
    def open(cls, path: Path) -> SenseFile:
        """Read the sense in `path`.

        Raises:
            CheckpointError: it is no file of a sense, or one of an unknown format.
            TensorMismatch: a tensor is missing, unexpected, or of another shape or type.
        """
        unreadable = CheckpointError(
            f"File {path.name} is no sense that Cloister wrote, or is damaged; make it again.")
        try:
            with opened(path) as file:
                said = (file.metadata() or {}).get("cloister", "")
                found = {
                    name: (file.get_slice(name).get_dtype(),
                           tuple(file.get_slice(name).get_shape()))
                    for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError):
            raise unreadable from None
        if not said:
            raise unreadable
        header = records.decode(said.encode(), _Header, limit_bytes=_LIMIT, refuse=lambda why: (
            CheckpointError(f"File {path.name} cannot be used ({why}); make it again.")))
        if header.format != FORMAT:
            raise CheckpointError(
                f"File {path.name} is no sense of format {FORMAT}; use a newer Cloister.")
        if header.sense.encoder.layers > len(found):  # before a module is made for each
            raise unreadable
        _check(path, found, plan(header.sense))
        return cls(path, header.sense)

    @property
    def identity(self) -> str:
        """sha256 of the file, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load(self, dtype: torch.dtype = torch.float32) -> Sense:
        """Read the sense with its weights, plain ones in `dtype`, ready for inference.

        Raises:
            NonFiniteTensor: a tensor has a NaN or infinite entry.
        """
        with torch.device("meta"):
            sense = Sense(self.config)
        weights = {}
        with opened(self.path) as file:
            for name in plan(self.config):
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise NonFiniteTensor(
                        f"Tensor {name} of {self.path.name} has a NaN or infinite entry; train or "
                        "convert it again.")
                quantized = name.endswith((".q", ".scale"))
                weights[name] = tensor if quantized else tensor.to(dtype)
        sense.load_state_dict(weights, assign=True)
        return sense.eval()


def plan(config: SenseConfig, dtype: torch.dtype = torch.float32) -> Plan:
    """Return the tensors of a sense of `config`, those that are not quantized in `dtype`."""
    with torch.device("meta"):
        sense = Sense(config)
    return {
        name: (tensor.dtype if name.endswith((".q", ".scale")) else dtype, tuple(tensor.shape))
        for name, tensor in sense.state_dict().items()}


def write(
    path: Path, config: SenseConfig, tensors: Iterable[tuple[str, torch.Tensor]],
    planned: Plan | None = None
) -> None:
    """Write a sense, `tensors` in the order of `planned`, by default those of `plan` in float32.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.files.whole_file`.
    """
    header = records.to_json(_Header(format=FORMAT, sense=config))
    with whole_file(path) as file:
        written = TensorFile(file, planned or plan(config), {"cloister": header})
        for name, tensor in tensors:
            written.add(name, tensor)
        written.finish()


def save(path: Path, sense: Sense) -> SenseFile:
    """Write a sense in memory, and return its file."""
    write(path, sense.config, sense.state_dict().items())
    return SenseFile.open(path)


def carried(
    senses: Mapping[SenseKind, SenseFile]
) -> dict[SenseKind, Callable[[Path], object]]:
    """Return what copies the files of `senses` (see `CheckpointWriter`)."""
    return {kind: partial(shutil.copyfile, each.path) for kind, each in senses.items()}


def fits(config: SenseConfig, form: PictureFormat | RecordingFormat) -> bool:
    """Whether a sense reads what `form` gives it, and gives as many vectors as it says."""
    shape = config.encoder
    if isinstance(form, PictureFormat):
        given = (form.height, form.width, form.tokens)
        return config.pixels is not None and given == (shape.rows, shape.columns, config.vectors)
    if config.mel is None or form.rate != config.mel.rate:
        return False
    longest = shape.columns * config.mel.hop  # samples
    whole = form.multiple % longest == 0 if config.pieces else form.most <= longest
    return whole and form.samples_per_token == config.samples_per_vector


def _check(
    path: Path, found: dict[str, tuple[str, tuple[int, ...]]], wanted: Plan
) -> None:
    for name in sorted(set(wanted) ^ set(found)):
        raise TensorMismatch(
            f"Tensor {name[:80]} is in {path.name} or in its configuration, but not in both; make "
            "it again.")
    for name, (kind, shape) in found.items():
        dtype, size = wanted[name]
        quantized = name.endswith((".q", ".scale"))
        known = kind == TYPE_NAMES[dtype] if quantized else kind in ("F32", "F16", "BF16")
        if shape != size or not known:
            raise TensorMismatch(
                f"Tensor {name} of {path.name} is {kind}{list(shape)}, not "
                f"{TYPE_NAMES[dtype]}{list(size)}; make it again.")
