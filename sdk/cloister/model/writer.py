"""Writes checkpoints: one tensor at a time, and all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from cloister.errors import CheckpointError, NotEnoughDisk, OutputExists
from cloister.model.checkpoint import INDEX, TYPE_NAMES

if TYPE_CHECKING:
    from io import BufferedWriter
    from types import TracebackType

    from cloister.model.checkpoint import Metadata, Plan

__all__ = ["CheckpointWriter", "check_output"]

SHARD_BYTES = 4_000_000_000  # of weights, above which there are several files


def check_output(path: Path, *, replace: bool) -> None:
    """Nothing, where a checkpoint may be written to `path`.

    Raises:
        OutputExists: it is there and `replace` is false, or it is anything but a checkpoint.
    """
    if not os.path.lexists(path):
        return
    if not replace:
        raise OutputExists(f"Output {path.name} exists already; name another or pass --force.")
    # What is replaced is removed: never a home directory named by mistake.
    if path.is_symlink() or not (path / "config.json").is_file():
        raise OutputExists(
            f"Output {path.name} exists and is no checkpoint, so it is not replaced; name another."
        )


class CheckpointWriter:
    """Writes a checkpoint beside its place, and moves it there once it is whole.

    Use as a context manager and `add` every tensor of `tensors` in that order; each goes to disk
    at once. On any failure nothing is left behind.

    Raises:
        OutputExists: `path` is there and `replace` is false, or it is anything but a checkpoint.
        NotEnoughDisk: less is free than the checkpoint takes, or the disk filled up.
        CheckpointError: the tokenizer is missing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        metadata: Metadata,
        tensors: Plan,
        tokenizer: Path,
        template: Path | str | None,  # a file, or the template itself
        replace: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path, self.replace = Path(path), replace
        self._metadata, self._tokenizer, self._template = metadata, tokenizer, template
        self._files = _divide(tensors, shard_bytes)
        self._plan = tensors
        self._pending = list(tensors)
        self._sizes = {
            name: torch.Size(shape).numel() * dtype.itemsize
            for name, (dtype, shape) in tensors.items()
        }

    def __enter__(self) -> Self:
        check_output(self.path, replace=self.replace)
        parent = self.path.resolve().parent
        if not parent.is_dir():
            raise CheckpointError(
                f"Directory {parent.name} does not exist; create it or name another output."
            )
        need, free = sum(self._sizes.values()), shutil.disk_usage(parent).free
        if need > free:
            raise NotEnoughDisk(
                f"Checkpoint {self.path.name} takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB "
                "are free; make room or name another disk."
            )
        try:
            self._directory = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=parent))
        except OSError as error:
            raise _disk_error(error, self.path) from error
        self._file: BufferedWriter | None = None
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        assert self._pending and self._pending[0] == name, f"{name} is out of order"
        dtype, shape = self._plan[name]
        assert tuple(tensor.shape) == tuple(shape), f"{name} has shape {tuple(tensor.shape)}"
        self._pending.pop(0)
        try:
            for file, names in self._files.items():
                if names[0] == name:
                    self._begin(file, names)
            data = tensor.detach().to(dtype).contiguous().flatten()
            assert self._file is not None
            self._file.write(data.view(torch.uint8).numpy().data)
        except OSError as error:
            raise _disk_error(error, self.path) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._file is not None:
                self._file.close()
            if kind is None:
                assert not self._pending, f"{self._pending[0]} was not added"
                self._finish()
        except OSError as failure:
            raise _disk_error(failure, self.path) from failure
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _begin(self, file: str, names: list[str]) -> None:
        if self._file is not None:
            self._file.close()
        header, offset = {}, 0
        for name in names:
            dtype, shape = self._plan[name]
            end = offset + self._sizes[name]
            header[name] = {
                "dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # keeps the data aligned
        self._file = (self._directory / file).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _finish(self) -> None:
        directory = self._directory
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": sum(self._sizes.values())},
                "weight_map": {name: file for file, names in self._files.items()
                               for name in names},
            }
            (directory / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        if not self._tokenizer.is_file():
            raise CheckpointError(
                f"There is no {self._tokenizer.name} beside the weights; copy the tokenizer there."
            )
        shutil.copyfile(self._tokenizer, directory / "tokenizer.json")
        if self._template is not None:
            text = self._template
            text = text.read_text("utf-8") if isinstance(text, Path) else text
            (directory / "chat_template.jinja").write_text(text, "utf-8")
        (directory / "config.json").write_text(self._metadata.to_json(), "utf-8")
        directory.chmod(0o755)
        if self.replace and self.path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=directory.parent))
            try:
                self.path.rename(old / "old")
                directory.rename(self.path)
            finally:
                if not self.path.exists() and (old / "old").exists():
                    (old / "old").rename(self.path)
                shutil.rmtree(old, ignore_errors=True)
        else:
            directory.rename(self.path)


def _divide(tensors: Plan, limit: int) -> dict[str, list[str]]:
    """Names of the tensors of each file, none above `limit` bytes unless one tensor is."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _disk_error(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotEnoughDisk(
            f"The disk filled up while {path.name} was written; make room and run it again."
        )
    return CheckpointError(f"Writing {path.name} failed: {error.strerror}; check the directory.")
