"""Which files of a directory hold its weights; where there are none to read, why.

Where several stand beside each other, the choice is that of transformers 5.24
(`modeling_utils._get_resolved_checkpoint_files`): `model.safetensors` before an index and its
shards. Pickles, which transformers takes last, are never read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from cloister import records
from cloister.errors import CheckpointError, TensorMismatch
from cloister.model.tensor_file import opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import torch

__all__ = ["INDEX", "Stored", "passed_over", "read_json", "shards", "weight_files"]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_JSON_LIMIT = 64 << 20
_POINTER = b"version https://git-lfs"
_WEIGHTS = re.compile(
    r".+\.(safetensors|gguf)(\.index\.json)?"
    r"|(pytorch_model|consolidated|adapter_model|tf_model|flax_model).*"
    r"\.(bin|pth|pt|h5|msgpack)(\.index\.json)?"
)
_UNFINISHED = ("*.incomplete", "*.part", "*.crdownload", "*.aria2",
               ".cache/huggingface/download/*.incomplete")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor as a file holds it."""

    key: str  # its name in the file
    kind: str  # its type there: BF16, Q4_1, ...
    dtype: torch.dtype | None  # of what `read` gives; None for a type that we do not take
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def read_json(path: Path) -> dict[str, object]:
    """Read the JSON object in `path`.

    Raises:
        CheckpointError: no such file, too large, or not a JSON object whose keys occur once each.
    """
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError(
            f"Directory {path.parent.name} has no {path.name}; name a checkpoint directory."
        )
    try:
        with path.open("rb") as file:
            raw = file.read(_JSON_LIMIT + 1)
    except OSError:
        raise CheckpointError(
            f"File {path.name} in {path.parent.name} cannot be read; check its permissions."
        ) from None
    return records.parse(raw, limit_bytes=_JSON_LIMIT, foreign=True, refuse=lambda complaint: (
        CheckpointError(
            f"File {path.name} in {path.parent.name} cannot be used ({complaint}); copy it again."
        )
    ))


def weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Return each file of weights with the tensors that an index expects in it, if one does.

    Raises:
        CheckpointError: there are none, or not all that the index names, or it is malformed or
            leaves the directory.
    """
    single, index = directory / _SINGLE, directory / INDEX
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise CheckpointError(_why_none(directory))
    malformed = CheckpointError(
        f"The weight index in {directory.name} is malformed; copy the checkpoint again."
    )
    listed = records.build(
        read_json(index).get("weight_map"), dict[str, str], refuse=lambda complaint: malformed
    )
    if not listed or not all(file == (directory / file).name for file in listed.values()):
        raise malformed
    expected: dict[Path, set[str] | None] = {}
    for name, file in listed.items():
        tensors = expected.setdefault(directory / file, set())
        assert tensors is not None
        tensors.add(name)
    missing = sorted(path.name for path in expected if not path.is_file())
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The download of {directory.name} is incomplete: of the {len(expected)} files that "
            f"{INDEX} names, {missing[0]}{others} is not there; download what is missing."
        )
    return expected


def shards(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor.

    Raises:
        CheckpointError: see `weight_files`, or a file is cut off or damaged.
        TensorMismatch: the index names a tensor that its file does not hold, or the reverse.
    """
    where: dict[str, Path] = {}
    for path, expected in weight_files(directory).items():
        found = _header(path)
        for name in sorted(set(found) ^ (set(found) if expected is None else expected)):
            raise TensorMismatch(
                f"Tensor {name} is in the index of {directory.name} or in a shard, but not in "
                "both; copy the checkpoint again."
            )
        where |= dict.fromkeys(found, path)
    return where


def passed_over(directory: Path, used: Iterable[Path]) -> tuple[str, ...]:
    """Return the names of the other files of weights in `directory`, which nobody reads."""
    names = {path.name for path in used}
    if _SINGLE not in names:
        names.add(INDEX)
    return tuple(sorted(
        path.name for path in directory.iterdir()
        if _WEIGHTS.fullmatch(path.name) and path.name not in names
    ))


def _header(path: Path) -> list[str]:
    try:
        with opened(path) as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        raise CheckpointError(
            f"File {path.name} in {path.parent.name} {_damage(path)}."
        ) from None


def _damage(path: Path) -> str:
    """Say what is wrong with a file that safetensors cannot read, and what to do."""
    again = "download or copy it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
            if start == _POINTER:
                return "is a pointer of Git LFS and not the weights; run git lfs pull there"
            file.seek(8)
            length = int.from_bytes(start[:8], "little")
            header = file.read(min(length, _JSON_LIMIT))
        if len(header) < length <= _JSON_LIMIT and header[:1] in (b"", b"{"):
            return f"is damaged or truncated: it ends within its header; {again}"
        whole = 8 + length + max(
            value["data_offsets"][1] for name, value in json.loads(header).items()
            if name != "__metadata__"
        )
        if size < whole:
            return f"is truncated: {size} bytes of {whole} are there; {again}"
    except OSError:
        return "cannot be read; check its permissions"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        pass  # a header that says nothing
    return f"is damaged or truncated; {again}"


def _why_none(directory: Path) -> str:
    """Say why there are no weights to read, and what to do."""
    def found(*patterns: str) -> str | None:
        matches = (path for pattern in patterns for path in directory.glob(pattern))
        return next((path.name for path in sorted(matches)), None)

    hanging = next((path.name for path in sorted(directory.glob("*.safetensors*"))
                    if not path.exists()), None)
    if name := found(*_UNFINISHED) or hanging:
        return (f"The download of {directory.name} broke off ({name} is not whole); "
                "download it again.")
    if name := found("model-*-of-*.safetensors"):
        return (f"Directory {directory.name} has {name} and no {INDEX}, which says what is in "
                "which file; download that too.")
    if found("adapter_config.json", "adapter_model.*"):
        return (f"Directory {directory.name} holds an adapter without the model that it changes; "
                "merge them first (peft: merge_and_unload, then save_pretrained).")
    if name := found("consolidated*"):
        return (f"Directory {directory.name} holds weights in their makers' own layout only "
                f"({name}); download the same model's {_SINGLE}, or its shards and {INDEX}.")
    if name := found("pytorch_model*", "*.bin", "*.pth", "*.pt"):
        return (f"Directory {directory.name} holds pickled weights only ({name}), which can run "
                "programs and are never read; save it again as safetensors (transformers: "
                "from_pretrained, then save_pretrained).")
    if name := found("*.gguf"):
        return f"Directory {directory.name} holds GGUF files; name one of them, such as {name}."
    if name := found("*.safetensors"):
        return (f"Directory {directory.name} has {name} and neither {_SINGLE} nor {INDEX}; "
                f"rename it to {_SINGLE} if it is the whole model.")
    return (f"Directory {directory.name} has no weights (neither {_SINGLE} nor {INDEX}); name a "
            "model's directory.")
