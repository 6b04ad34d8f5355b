"""The manifest of a bundle: what it says, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, TypeVar

from cloister.errors import BundleVersionError, ManifestInvalid, SettingError
from cloister.tiers import Shape

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FORMAT", "LIMIT_BYTES", "FileEntry", "Manifest", "ProgramEntry"]

FORMAT = 1
LIMIT_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ProgramEntry:
    """An ExecuTorch program and the backend it needs."""

    file: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file must be."""

    sha256: str
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says of a bundle.

    Raises:
        ManifestInvalid: a value of the wrong type, out of bounds, or contradicting another.
    """

    format: int
    name: str  # of the tier or model
    shape: Shape
    context: int  # tokens
    prefill_chunk: int  # most tokens in one call
    recipe: str
    programs: tuple[ProgramEntry, ...]  # in order of preference
    executorch: str  # release that made the programs
    bos: int | None
    eos: tuple[int, ...]
    weight_bytes: int
    kv_bytes: int  # for the whole context
    arena_bytes: int  # activations planned by the exporter
    parent: str  # identity of the checkpoint
    files: Mapping[str, FileEntry]  # every other file of the bundle

    def __post_init__(self) -> None:
        for field in ("context", "prefill_chunk", "weight_bytes", "kv_bytes", "arena_bytes"):
            _need(_whole(getattr(self, field)), f"{field} is no whole number")
        for field in ("name", "recipe", "executorch", "parent"):
            _need(_label(getattr(self, field)), f"{field} is no short printable text")
        _need(1 <= self.prefill_chunk <= self.context, "prefill_chunk is not within the context")
        _need(self.context == self.shape.context, "context differs from the shape's")
        _need(bool(self.programs), "it lists no program")
        _need(bool(_HASH.fullmatch(self.parent)), "parent is no sha256")
        for token in (*self.eos, *([] if self.bos is None else [self.bos])):
            _need(_whole(token) and token < self.shape.vocab_size, "a token id is out of range")
        for file, entry in self.files.items():
            _need(
                bool(_NAME.fullmatch(file)) and file != "manifest.json",
                "a file name is not a plain name inside the bundle",
            )
            _need(
                isinstance(entry.sha256, str) and bool(_HASH.fullmatch(entry.sha256))
                and _whole(entry.size),
                "a file's hash or size is malformed",
            )
        for program in self.programs:
            _need(_label(program.file), "a program's file is no text")
            _need(_label(program.backend), "a program's backend is no short printable text")
        _need(
            sorted(program.file for program in self.programs)
            == sorted(file for file in self.files if file.endswith(".pte")),
            "its programs are not the .pte files that it lists",
        )

    def to_json(self) -> str:
        """The text of `manifest.json`; the same manifest always gives the same text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            BundleVersionError: a format that this release does not know.
            ManifestInvalid: anything else that is not as the format says.
        """
        _need(len(raw) <= LIMIT_BYTES, "it is over 1 MiB")
        try:
            record = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            raise ManifestInvalid(_sentence("it is not valid JSON")) from None
        _need(isinstance(record, dict), "it is no JSON object")
        version = record.get("format")
        if version != FORMAT or type(version) is not int:
            raise BundleVersionError(
                f"The bundle's format is not {FORMAT}, the one this release of Cloister reads; "
                "export it again or install the release that made it."
            )
        record["shape"] = _build(Shape, record.get("shape"))
        record["programs"] = tuple(
            _build(ProgramEntry, entry) for entry in _list(record, "programs")
        )
        record["eos"] = tuple(_list(record, "eos"))
        files = record.get("files")
        _need(isinstance(files, dict), "files is no object")
        record["files"] = {name: _build(FileEntry, entry) for name, entry in files.items()}
        return _build(cls, record)


def _build(kind: type[_T], record: object) -> _T:
    _need(isinstance(record, dict), f"a {kind.__name__} is no object")
    assert isinstance(record, dict)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # all dataclasses
    for name in sorted(names ^ set(record)):
        _need(False, f"{kind.__name__} has a missing or unknown field {name[:40]!r}")
    if kind is Shape:
        for name, value in record.items():
            _need(
                type(value) is bool if name == "tied" else _whole(value),
                f"shape.{name} is of the wrong type",
            )
    try:
        return kind(**record)
    except SettingError as error:
        raise ManifestInvalid(_sentence(str(error).rstrip("."))) from error


def _list(record: Mapping[str, object], name: str) -> list[object]:
    value = record.get(name)
    _need(isinstance(value, list), f"{name} is no list")
    assert isinstance(value, list)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key occurs twice")
    return record


def _label(value: object) -> bool:
    """Whether `value` can be shown in one line of a terminal."""
    return isinstance(value, str) and value.isprintable() and len(value) <= 100


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _need(condition: bool, complaint: str) -> None:
    if not condition:
        raise ManifestInvalid(_sentence(complaint))


def _sentence(complaint: str) -> str:
    return f"The bundle's manifest cannot be used ({complaint}); export or copy the bundle again."
