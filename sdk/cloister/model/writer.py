"""The writer of checkpoints: one tensor at a time, and all of it or nothing."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cloister import files
from cloister.errors import CheckpointError
from cloister.model.shards import INDEX
from cloister.model.tensor_file import TensorFile, size_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from io import BufferedWriter
    from types import TracebackType

    import torch

    from cloister.model.checkpoint import Metadata
    from cloister.model.sense_file import SenseKind
    from cloister.model.tensor_file import Plan

__all__ = ["CheckpointWriter", "check_output"]

_KIND = "checkpoint"
SHARD_BYTES = 4_000_000_000  # of weights, above which there are several files


def check_output(path: Path, *, replace: bool) -> None:
    """Raise OutputExists unless a checkpoint may be written to `path`."""
    files.check_output(path, kind=_KIND, replace=replace)


class CheckpointWriter:
    """A checkpoint written beside its place, and moved there once it is whole.

    Use as a context manager and `add` every tensor of `tensors` in that order; each goes to disk
    at once. On any failure nothing is left behind. With `private` only its owner can read it.

    Raises:
        OutputExists, NotEnoughDisk, OutputUnwritable: see `cloister.files.whole_directory`.
        CheckpointError: the tokenizer is missing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        metadata: Metadata,
        tensors: Plan,
        tokenizer: Path | str,  # a file, or its contents
        template: Path | str | None,  # a file, or the template itself
        replace: bool = False,
        private: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path, self._replace, self._private = Path(path), replace, private
        self._metadata, self._tokenizer, self._template = metadata, tokenizer, template
        self._files = _divide(tensors, shard_bytes)
        self._plan = tensors
        self._senses: Mapping[SenseKind, Callable[[Path], object]] = {}
        self._pending = list(tensors)
        self._total = sum(size_bytes(*each) for each in tensors.values())

    def with_senses(self, senses: Mapping[SenseKind, Callable[[Path], object]]) -> Self:
        """Let each of `senses` write its file (`sense_file.carried`, `sense_file.write`)."""
        self._senses = senses
        return self

    def __enter__(self) -> Self:
        self._written = self._write()
        self._directory = self._written.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None
    ) -> None:
        self._written.__exit__(kind, error, trace)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        assert self._pending and self._pending[0] == name, f"{name} is out of order"
        self._pending.pop(0)
        for file, names in self._files.items():
            if names[0] == name:
                self._begin(file, names)
        self._tensors.add(name, tensor)

    @contextmanager
    def _write(self) -> Iterator[Path]:
        self._file: BufferedWriter | None = None
        with files.whole_directory(
            self.path, kind=_KIND, size_bytes=self._total,
            replace=self._replace, private=self._private,
        ) as directory:
            try:
                yield directory
            finally:
                if self._file is not None:
                    self._file.close()
            assert not self._pending, f"{self._pending[0]} was not added"
            self._finish(directory)

    def _begin(self, file: str, names: list[str]) -> None:
        if self._file is not None:
            self._file.close()
        self._file = (self._directory / file).open("wb")
        self._tensors = TensorFile(self._file, {name: self._plan[name] for name in names})

    def _finish(self, directory: Path) -> None:
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {name: file for file, names in self._files.items() for name in names},
            }
            (directory / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        if isinstance(self._tokenizer, Path) and not self._tokenizer.is_file():
            raise CheckpointError(
                f"There is no {self._tokenizer.name} beside the weights; copy the tokenizer there."
            )
        _put(self._tokenizer, directory / "tokenizer.json")
        if self._template is not None:
            _put(self._template, directory / "chat_template.jinja")
        for kind, write in self._senses.items():
            write(directory / kind.file)
        (directory / files.MARKS[_KIND]).write_text(self._metadata.to_json(), "utf-8")


def _put(source: Path | str, path: Path) -> None:
    """Copy a file, or write a text as it is."""
    if isinstance(source, Path):
        shutil.copyfile(source, path)
    else:
        path.write_bytes(source.encode())


def _divide(tensors: Plan, limit: int) -> dict[str, list[str]]:
    """Return the tensor names of each file, none above `limit` bytes unless one tensor is."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, each in tensors.items():
        size = size_bytes(*each)
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
