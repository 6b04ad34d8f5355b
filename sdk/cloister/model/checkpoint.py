"""Checkpoints: a directory of weights, their configuration, and the tokenizer.

    config.json           format, name, model configuration, recipe, parent's identity, token ids
    model.safetensors     weights (above 4 GB: shards, and model.safetensors.index.json)
    tokenizer.json        as the tokenizers library and ExecuTorch's C++ tokenizers read it
    chat_template.jinja   optional

A quantized tensor `NAME` is stored as `NAME.q` int8 and `NAME.scale`. Weights are read through
the file mapping one tensor at a time, and written one tensor at a time; pickles are never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open

from cloister.errors import (
    CheckpointError,
    NonFiniteTensor,
    NotEnoughDisk,
    OutputExists,
    SettingError,
    TensorMismatch,
)
from cloister.model.config import ModelConfig
from cloister.model.quantized import scale_dtype, swap
from cloister.model.recipe import Recipe
from cloister.model.transformer import Decoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import BufferedWriter
    from types import TracebackType

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Metadata",
    "Plan",
    "check_finite",
    "expected_tensors",
    "plan",
    "read_json",
    "shards",
]

FORMAT = 1
SHARD_BYTES = 4_000_000_000
_JSON_LIMIT = 64 << 20
_INDEX = "model.safetensors.index.json"
_TYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
}

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""What a checkpoint holds: type and shape of each tensor, by name, in order."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What `config.json` says."""

    name: str
    config: ModelConfig
    recipe: str | None = None
    parent: str | None = None  # identity of the checkpoint this one was made from
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def to_json(self) -> str:
        """The text of `config.json`."""
        record = {
            "format": FORMAT, "name": self.name, "config": self.config.to_dict(),
            "recipe": self.recipe, "parent": self.parent, "bos": self.bos, "eos": list(self.eos),
        }
        return json.dumps(record, indent=1, sort_keys=True) + "\n"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a plain decoder of `config`, by name, in order."""
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if config.shape.tied:
        del shapes["head.weight"]
    return shapes


def plan(config: ModelConfig, recipe: str | None, dtype: torch.dtype = torch.float32) -> Plan:
    """What a checkpoint of `config` holds, in order; without a recipe, all of it in `dtype`."""
    shapes = expected_tensors(config)
    if recipe is None:
        return {name: (dtype, shape) for name, shape in shapes.items()}
    chosen, result = Recipe.parse(recipe), Plan()
    for name, shape in shapes.items():
        scheme = chosen.scheme_of(name)
        if scheme is None:
            result[name] = torch.float32, shape
        else:
            result[f"{name}.q"] = torch.int8, shape
            result[f"{name}.scale"] = scale_dtype(scheme), (shape[0], scheme.groups(shape[1]))
    return result


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: no such file, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise CheckpointError(f"File {path.name} is over 64 MiB; it is not a configuration.")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"Directory {path.parent.name} has no {path.name}; name a checkpoint directory."
        ) from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(
            f"File {path.name} in {path.parent.name} cannot be read as JSON; copy it again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"File {path.name} in {path.parent.name} holds no JSON object.")
    return value


def shards(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the index or the single file's header.

    Raises:
        CheckpointError: no weights, a damaged header, or an index that leaves the directory.
        TensorMismatch: the index names a tensor that its file does not hold, or the reverse.
    """
    index = directory / _INDEX
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in listed.values()
        ):
            raise CheckpointError(
                f"The weight index in {directory.name} is malformed; copy the checkpoint again."
            )
        where = {name: directory / file for name, file in listed.items()}
        held = {name for file in set(where.values()) for name in _header(file)}
        for name in sorted(held ^ set(where)):
            raise TensorMismatch(
                f"Tensor {name} is in the index of {directory.name} or in a shard, but not in "
                "both; copy the checkpoint again."
            )
        return where
    single = directory / "model.safetensors"
    return dict.fromkeys(_header(single), single)


def _header(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise CheckpointError(
            f"Directory {path.parent.name} has no {path.name}; convert the weights to "
            "safetensors first."
        ) from None
    except (SafetensorError, OSError):
        raise CheckpointError(
            f"File {path.name} in {path.parent.name} is damaged or truncated; copy it again."
        ) from None


class Checkpoint:
    """A checkpoint on disk, its headers read and checked, its weights still there."""

    def __init__(self, path: Path, metadata: Metadata, where: Mapping[str, Path]) -> None:
        self.path, self.metadata, self._where = path, metadata, where

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read `path`.

        Raises:
            CheckpointError: it is no checkpoint, or one of an unknown format.
            TensorMismatch: a tensor is missing, unexpected, or of another shape or type.
        """
        path = Path(path)
        record = read_json(path / "config.json")
        if record.get("format") != FORMAT:
            hint = "import it first" if "architectures" in record else "use a newer Cloister"
            raise CheckpointError(
                f"Directory {path.name} is no Cloister checkpoint of format {FORMAT}; {hint}."
            )
        metadata = _metadata(record, path)
        checkpoint = cls(path, metadata, shards(path))
        checkpoint._check()
        return checkpoint

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer file."""
        return self.path / "tokenizer.json"

    @property
    def template_path(self) -> Path | None:
        """The chat template, where there is one."""
        path = self.path / "chat_template.jinja"
        return path if path.exists() else None

    @cached_property
    def identity(self) -> str:
        """sha256 over the sorted names and hashes of the files, in hex."""
        total = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n"
                             .encode())
        return total.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        try:
            with safe_open(self._where[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError):
            raise CheckpointError(
                f"Tensor {name} of checkpoint {self.path.name} cannot be read; copy it again."
            ) from None
        return tensor

    def load(self) -> Decoder:
        """The decoder with its weights, plain ones in float32, ready for inference.

        Raises:
            NonFiniteTensor: a tensor has a NaN or infinite entry.
        """
        with torch.device("meta"):
            decoder = Decoder(self.metadata.config)
            if self.metadata.recipe is not None:
                swap(decoder, Recipe.parse(self.metadata.recipe))
        for name in self._where:
            tensor = self.tensor(name)
            check_finite(tensor, name, self.path)
            if not name.endswith((".q", ".scale")):
                tensor = tensor.float()
            owner, _, attribute = name.rpartition(".")
            module = decoder.get_submodule(owner)
            if isinstance(getattr(module, attribute), torch.nn.Parameter):
                setattr(module, attribute, torch.nn.Parameter(tensor))
            else:
                setattr(module, attribute, tensor)
        if self.metadata.config.shape.tied:
            decoder.head.weight = decoder.embed.weight
        return decoder.eval()

    def _check(self) -> None:
        wanted = plan(self.metadata.config, self.metadata.recipe)
        for name in sorted(set(wanted) - set(self._where)):
            raise TensorMismatch(
                f"Checkpoint {self.path.name} lacks tensor {name}; make it again."
            )
        for name in sorted(set(self._where) - set(wanted)):
            raise TensorMismatch(
                f"Checkpoint {self.path.name} has tensor {name}, which its configuration does "
                "not; make it again."
            )
        for name, dtype, shape in self._headers():
            kind, size = wanted[name]
            quantized = name.endswith((".q", ".scale"))
            known = dtype == _TYPE_NAMES[kind] if quantized else dtype in ("F32", "F16", "BF16")
            if shape != size or not known:
                raise TensorMismatch(
                    f"Tensor {name} of checkpoint {self.path.name} is {dtype}{list(shape)}, not "
                    f"{_TYPE_NAMES[kind]}{list(size)}; make the checkpoint again."
                )

    def _headers(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for path in dict.fromkeys(self._where.values()):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    part = file.get_slice(name)
                    yield name, part.get_dtype(), tuple(part.get_shape())


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raise NonFiniteTensor if `tensor` has a NaN or infinite entry."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteTensor(
            f"Tensor {name} of {path.name} has a NaN or infinite entry; train or convert it again."
        )


def _metadata(record: Mapping[str, object], path: Path) -> Metadata:
    name, recipe, parent = record.get("name"), record.get("recipe"), record.get("parent")
    config, bos, eos = record.get("config"), record.get("bos"), record.get("eos")
    if (
        not isinstance(name, str)
        or not (recipe is None or isinstance(recipe, str))
        or not (parent is None or isinstance(parent, str))
        or not isinstance(config, dict)
        or not (bos is None or type(bos) is int)
        or not isinstance(eos, list)
        or not all(type(token) is int for token in eos)
    ):
        raise CheckpointError(
            f"The configuration of checkpoint {path.name} has a missing field or one of the "
            "wrong type; make the checkpoint again."
        )
    try:
        if recipe is not None:
            Recipe.parse(recipe)
        return Metadata(
            name=name, config=ModelConfig.from_dict(config), recipe=recipe, parent=parent,
            bos=bos, eos=tuple(eos),
        )
    except SettingError as error:
        raise CheckpointError(f"Checkpoint {path.name} cannot be used: {error}") from error


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
                "dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end],
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
            (directory / _INDEX).write_text(json.dumps(index, indent=1), "utf-8")
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
