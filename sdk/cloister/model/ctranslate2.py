"""Whisper encoders in CTranslate2's files: `model.bin`, as faster-whisper's models have it.

A file is little-endian: version, the name of the layout and its revision, then every variable with
its name, shape, type and bytes, then the names that stand for others. Read as CTranslate2 4 writes
it (python/ctranslate2/specs/model_spec.py).
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cloister.errors import CheckpointError, SettingError, TensorMismatch, UnsupportedFeature
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.shards import Stored

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["NAME", "encoder"]

NAME = "model.bin"
_VERSIONS = (5, 6)
_LAYOUT = "WhisperSpec"
_TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16,
          5: torch.bfloat16}
_HELD = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_MOST = 100_000  # variables
_BLOCK = (
    (r"self_attention/layer_norm", "attn_norm"), (r"self_attention/linear_1", "attn.o"),
    (r"ffn/layer_norm", "mlp_norm"), (r"ffn/linear_0", "mlp.up"), (r"ffn/linear_1", "mlp.down"),
)
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


@dataclass
class _Cursor:
    """A place in the bytes of a file."""

    data: mmap.mmap
    at: int = 0

    def take(self, code: str) -> Any:
        value, = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        raw: bytes = self.take(f"{self.take('H')}s")
        return raw.rstrip(b"\0").decode()


def encoder(path: Path) -> tuple[EncoderShape, dict[str, Stored]]:
    """Return the shape of the encoder in `path`, and its tensors by the names of `Encoder`.

    Raises:
        CheckpointError: it is no such file, of another version, cut off or damaged.
        UnsupportedFeature: its weights are quantized.
        TensorMismatch: a tensor is missing or not of the shape that the others give it.
    """
    found = _variables(path)
    for name, each in found.items():
        if each.dtype is None and each.shape:
            raise UnsupportedFeature(
                f"{path.name} holds {name} in {each.kind}; convert the model again with "
                "--quantization float16.")
    try:
        heads = int(found["num_heads"].read())
        positions, hidden = found["position_encodings/encodings"].shape
        _, bins, _ = found["conv1/weight"].shape
        up, _ = found["layer_0/ffn/linear_0/weight"].shape
    except (KeyError, ValueError, RuntimeError):
        raise TensorMismatch(
            f"{path.name} lacks tensors of a Whisper encoder; copy it again.") from None
    layers = {name.partition("/")[0] for name in found if re.match(r"layer_\d", name)}
    try:
        shape = EncoderShape(
            stem=Stem.CONVOLUTIONS_1D, rows=bins, positions=positions, hidden_size=hidden,
            layers=len(layers), heads=heads, feed_forward=up, key_bias=False)
    except SettingError as error:
        raise CheckpointError(f"The encoder in {path.name} cannot be built: {error}") from None
    return shape, dict(_named(found, path, hidden))


def _named(
    found: dict[str, Stored], path: Path, hidden: int
) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors by our names."""
    for name, each in found.items():
        owner, _, kind = name.rpartition("/")
        layer = re.match(r"layer_(\d+)/(.+)", owner)
        if name == "position_encodings/encodings":
            yield "positions", each
        elif owner in ("conv1", "conv2"):
            yield f"stem.{'first' if owner == 'conv1' else 'second'}.{kind}", each
        elif owner == "layer_norm":
            yield f"norm.{_KINDS[kind]}", each
        elif layer and layer[2] == "self_attention/linear_0":
            if each.shape[0] != 3 * hidden:
                raise TensorMismatch(f"Tensor {each.key} of {path.name} has {each.shape[0]} rows, "
                                     f"not {3 * hidden}; copy it again.")
            for at, part in enumerate("qkv"):
                if (part, kind) == ("k", "bias"):
                    _check_zero(each, path, hidden)
                    continue
                yield f"layers.{layer[1]}.attn.{part}.{kind}", replace(
                    each, shape=(hidden, *each.shape[1:]), read=partial(_third, each, at))
        elif layer and (ours := dict(_BLOCK).get(layer[2])) is not None:
            yield f"layers.{layer[1]}.{ours}.{_KINDS[kind]}", each


def _third(each: Stored, at: int) -> torch.Tensor:
    return each.read().chunk(3)[at]


def _check_zero(each: Stored, path: Path, hidden: int) -> None:
    """Raise UnsupportedFeature if keys have a bias, which Whisper's do not."""
    if each.read()[hidden:2 * hidden].any():
        raise UnsupportedFeature(
            f"{path.name} has a bias of its keys in {each.key}, which Whisper has not, so it "
            "cannot be imported.")


def _variables(path: Path) -> dict[str, Stored]:
    """Return the encoder's variables, without the prefix of their names."""
    damaged = CheckpointError(f"File {path.name} is damaged or truncated; copy it again.")
    try:
        with path.open("rb") as file:
            cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):  # an empty file cannot be mapped
        raise damaged from None
    try:
        version, layout, _, count = (
            cursor.take("I"), cursor.text(), cursor.take("I"), cursor.take("I"))
        if layout != _LAYOUT or version not in _VERSIONS:
            raise CheckpointError(
                f"File {path.name} holds {layout[:40]!a} of version {version}, and Cloister "
                f"reads {_LAYOUT} of version {' or '.join(map(str, _VERSIONS))}.")
        if count > _MOST:
            raise damaged
        found = dict(_variable(cursor) for _ in range(count))
    except (struct.error, UnicodeDecodeError, KeyError):
        raise damaged from None
    if cursor.at > len(cursor.data):
        raise damaged
    return {name.removeprefix("encoder/"): each for name, each in found.items()
            if name.startswith("encoder/")}


def _variable(cursor: _Cursor) -> tuple[str, Stored]:
    name, rank = cursor.text(), cursor.take("B")
    shape = tuple(cursor.take("I") for _ in range(rank))
    dtype, size = _TYPES[cursor.take("B")], cursor.take("I")
    if size != torch.Size(shape).numel() * dtype.itemsize or cursor.at + size > len(cursor.data):
        raise KeyError(name)
    read = partial(_read, cursor.data, cursor.at, shape, dtype)
    cursor.at += size
    kind = _HELD.get(dtype, str(dtype).removeprefix("torch."))
    return name, Stored(
        key=name, kind=kind, dtype=dtype if dtype in _HELD else None, shape=shape, read=read)


def _read(data: mmap.mmap, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    raw = bytearray(data[at:at + count * dtype.itemsize])
    return torch.frombuffer(raw, dtype=dtype, count=count).view(shape)
