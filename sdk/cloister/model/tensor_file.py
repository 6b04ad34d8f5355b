"""A safetensors file, read, and written one tensor at a time."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from cloister.interrupt import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Any, BinaryIO

__all__ = ["TYPE_NAMES", "Plan", "TensorFile", "opened", "size_bytes"]

TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
              torch.uint8: "U8"}

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor of a checkpoint, by name, in order."""


def size_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Return the bytes of one tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


@contextmanager
def opened(path: Path) -> Iterator[Any]:  # `safe_open` has no types
    """Open the file in `path` to read tensors from.

    Ctrl-C waits until it is closed: torch would make a ValueError of one that comes while
    safetensors reads a tensor.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with uninterrupted(), safe_open(path, framework="pt") as file:
        yield file


class TensorFile:
    """An open file to `add` every tensor of `plan` to, in that order."""

    def __init__(
        self, file: BinaryIO, plan: Plan, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._file, self._plan, self._pending = file, plan, list(plan)
        header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        offset = 0
        for name, (dtype, shape) in plan.items():
            end = offset + size_bytes(dtype, shape)
            header[name] = {
                "dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # keeps the data aligned
        file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        assert self._pending and self._pending.pop(0) == name, f"{name} is out of order"
        dtype, shape = self._plan[name]
        assert tuple(tensor.shape) == tuple(shape), f"{name} has shape {tuple(tensor.shape)}"
        data = tensor.detach().to("cpu", dtype).contiguous().flatten()
        self._file.write(data.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Check that every tensor was added."""
        assert not self._pending, f"{self._pending[0]} was not added"
