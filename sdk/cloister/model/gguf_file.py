"""GGUF files: what stands in their headers, and which bytes are a tensor's.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here and not
by `gguf.GGUFReader`, which makes a numpy array of every token (2 s and 160 MB for 49,152 of them)
and does not say what is wrong with a file.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from cloister.errors import CheckpointError, UnsupportedFeature

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Header", "Tensor", "is_gguf", "read"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}
_TEXT, _LIST, _FLOAT = 8, 9, 6


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor lies, and in which type; `shape` in torch's order."""

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a file, or of all parts of one that was split."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read(path: Path) -> Header:
    """Read the header of the file `path`, and of its other parts if it was split.

    Raises:
        CheckpointError: it is no GGUF file, cut off, damaged, big-endian, of another version, or
            one of several parts that are not all there.
        UnsupportedFeature: a tensor of a type that cannot be read.
    """
    first = _part(path)
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return first
    named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"File {path.name} is one of {count} parts and its name does not say which; name them "
            f"NAME-00001-of-{count:05}.gguf and so on, as they came."
        )
    paths = [path.with_name(f"{named[1]}-{part:05}-of-{count:05}.gguf")
             for part in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{named[1]} is split into {count} files and {missing[0]} is not there; put all of "
            "them into one directory."
        )
    parts = [_part(part) for part in paths]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    if len(tensors) != sum(len(part.tensors) for part in parts) or (
        len(tensors) != parts[0].metadata.get("split.tensors.count", len(tensors))
    ):
        raise CheckpointError(
            f"The parts of {named[1]} do not belong together; download them again."
        )
    return Header(path=path, metadata=parts[0].metadata, tensors=tensors)


@dataclass
class _Cursor:
    """A place in the bytes of a header."""

    data: mmap.mmap
    at: int = 0

    def take(self, code: str, count: int = 1) -> Any:
        """Read `count` numbers, or one as itself."""
        if count > (len(self.data) - self.at) // struct.calcsize(code):
            raise EOFError
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return values[0] if count == 1 else list(values)

    def text(self) -> str:
        length = self.take("Q")
        if length > len(self.data) - self.at:
            raise EOFError
        raw = self.data[self.at:self.at + length]
        self.at += length
        return raw.decode()

    def value(self) -> Any:
        kind = self.take("I")
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            kind, count = self.take("I"), self.take("Q")
            if kind != _TEXT:
                values = self.take(_SCALARS[kind], count)
                return [values] if count == 1 else values
            if count > len(self.data):
                raise EOFError
            return [self.text() for _ in range(count)]
        number = self.take(_SCALARS[kind])
        return float(str(np.float32(number))) if kind == _FLOAT else number  # 1e-05 as it was meant


def _part(path: Path) -> Header:
    """Read the header of one file."""
    try:
        with path.open("rb") as file:
            _check_beginning(file.read(8), path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data, 8), path)
    except OSError as error:
        raise CheckpointError(
            f"File {path.name} cannot be read ({error.strerror}); check the path and its "
            "permissions."
        ) from None
    except EOFError:
        raise CheckpointError(
            f"File {path.name} is truncated within its header; download it again."
        ) from None
    except (struct.error, ValueError, KeyError, OverflowError):
        raise CheckpointError(
            f"The header of file {path.name} is damaged; download it again."
        ) from None


def _check_beginning(start: bytes, path: Path) -> None:
    if start.startswith(b"version "):
        raise CheckpointError(
            f"File {path.name} is a pointer of Git LFS and not the model; run git lfs pull there."
        )
    if start[:4] != _MAGIC:
        raise CheckpointError(
            f"File {path.name} is no GGUF file; name a .gguf file or a Hugging Face directory."
        )
    if len(start) < 8:
        raise EOFError
    version = int.from_bytes(start[4:], "little")
    if version & 0xFFFF == 0:
        raise CheckpointError(
            f"File {path.name} was written for big-endian machines; take one for little-endian "
            "ones, or convert it again without --bigendian."
        )
    if version not in _VERSIONS:
        todo = "use a newer Cloister" if version > max(_VERSIONS) else (
            "convert it again with a newer llama.cpp")
        raise CheckpointError(
            f"File {path.name} is of GGUF version {version} and Cloister reads "
            f"{' and '.join(map(str, _VERSIONS))}; {todo}."
        )


def _header(cursor: _Cursor, path: Path) -> Header:
    tensor_count, entry_count = cursor.take("Q"), cursor.take("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text()
        if key in metadata:
            raise ValueError(key)
        metadata[key] = cursor.value()
    table = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.take("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(name)
        sizes = [cursor.take("Q") for _ in range(dimensions)]
        table.append((name, tuple(reversed(sizes)), cursor.take("I"), cursor.take("Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(alignment)
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    end = 0  # each tensor begins where the one before ends: ggml takes nothing else
    for name, shape, code, offset in table:
        kind = _kind(code, name, path)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape, dtype=object))
        if name in tensors or shape[-1] % block:
            raise ValueError(name)
        size = count // block * block_bytes
        if begin + offset + size > len(cursor.data):
            raise CheckpointError(
                f"File {path.name} is truncated: tensor {name[:60]} ends at byte "
                f"{begin + offset + size}, and {len(cursor.data)} are there; download it again."
            )
        if offset != -(-end // alignment) * alignment:
            raise ValueError(name)
        end = offset + size
        tensors[name] = Tensor(
            path=path, kind=kind, shape=shape, offset=begin + offset, size_bytes=size)
    return Header(path=path, metadata=metadata, tensors=tensors)


def _kind(code: int, name: str, path: Path) -> GGMLQuantizationType:
    """Return a type that can be read."""
    try:
        kind = GGMLQuantizationType(code)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError):
        known = {kind.value: kind.name for kind in GGMLQuantizationType}
        raise UnsupportedFeature(
            f"Tensor {name[:60]} of {path.name} is of type {known.get(code, code)}, which Cloister "
            "does not read; use a newer Cloister, or a file of another type."
        ) from None
    return kind
