"""Bundles: a directory that a notebook or a phone app runs, and that can prove what it is.

    manifest.json                         what it holds, with the sha256 and size of every file
    program.BACKEND.pte                   ExecuTorch programs
    tokenizer.json, chat_template.jinja   as the host and the C++ tokenizers read them
    receipt.json                          what was lost on the way, measured on this program
    golden.jsonl                          prompts with the ids they must give

No torch, and nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.errors import (
    BundleCorrupt,
    BundleError,
    IncompatibleProgram,
    ManifestInvalid,
    NotEnoughDisk,
    OutputExists,
)
from cloister.manifest import LIMIT_BYTES, FileEntry, Manifest, ProgramEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cloister.settings import Settings

__all__ = ["Bundle", "Golden", "finish", "write_golden", "writer"]

_PROGRAM = ".pte"
EXECUTORCH = (1, 4)  # the minor release that we run


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A public prompt and the ids that greedy decoding must give."""

    system: str | None
    prompt: str
    tokens: tuple[int, ...]
    margin: float  # smallest gap between the two best logits, over all steps


class Bundle:
    """An opened bundle: its manifest read, its small files hashed.

    Raises (from `open` and the methods):
        BundleError: not a bundle.
        ManifestInvalid, BundleVersionError: see `Manifest.from_json`.
        BundleCorrupt: a file is missing, unexpected, truncated or altered.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the bundle in `path`, and hash every file but the programs."""
        path = Path(path)
        try:
            if not _regular(path / "manifest.json"):  # a pipe would be waited for
                raise FileNotFoundError
            with (path / "manifest.json").open("rb") as file:
                raw = file.read(LIMIT_BYTES + 1)
        except OSError:
            raise BundleError(
                f"{path.name!r} is no bundle: it has no readable manifest.json; name a directory "
                "made by `cloister export`."
            ) from None
        bundle = cls(path, Manifest.from_json(raw))
        bundle._check_names()
        for name in bundle.manifest.files:
            if not name.endswith(_PROGRAM):
                bundle._check_file(name)
        return bundle

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer."""
        return self.path / "tokenizer.json"

    @property
    def template_path(self) -> Path | None:
        """The chat template, where there is one."""
        name = "chat_template.jinja"
        return self.path / name if name in self.manifest.files else None

    def program(self, runs_here: Callable[[str], bool]) -> ProgramEntry:
        """The first program whose backend `runs_here`.

        Raises:
            IncompatibleProgram: there is none, or ExecuTorch's promise does not cover it.
        """
        made = self.manifest.executorch.split(".")
        # A program is promised to load on the release that made it and on the next minor one
        # (ExecuTorch, runtime/COMPATIBILITY.md).
        minors = {(EXECUTORCH[0], EXECUTORCH[1] - 1), EXECUTORCH}
        if tuple(int(part) if part.isdecimal() else -1 for part in made[:2]) not in minors:
            raise IncompatibleProgram(
                f"Bundle {self.path.name} was made with ExecuTorch {self.manifest.executorch} and "
                f"this is {EXECUTORCH[0]}.{EXECUTORCH[1]}; export it again."
            )
        for entry in self.manifest.programs:
            if runs_here(entry.backend):
                return entry
        names = ", ".join(entry.backend for entry in self.manifest.programs)
        raise IncompatibleProgram(
            f"Bundle {self.path.name} has programs for {names} only, and none of these runs on "
            "this machine; export it for another backend."
        )

    def check_program(self, entry: ProgramEntry, settings: Settings) -> None:
        """Hash a program, unless this machine has seen this very file before."""
        try:
            stat = (self.path / entry.file).lstat()
        except OSError as error:
            raise self._unreadable(entry.file) from error
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        seen = _seen(settings.seen_programs)
        if seen.get(key) != self.manifest.files[entry.file].sha256:
            self._check_file(entry.file)
            seen[key] = self.manifest.files[entry.file].sha256
            _remember(settings.seen_programs, seen)

    def verify(self) -> None:
        """Hash every file, programs included, whatever was seen before."""
        for name in self.manifest.files:
            self._check_file(name)

    def model_id(self, entry: ProgramEntry) -> str:
        """sha256 over the hashes of the program, the tokenizer and the recipe, in hex.

        What sealed state is bound to: a new receipt does not change it.
        """
        files = self.manifest.files
        parts = (files[entry.file].sha256, files["tokenizer.json"].sha256, self.manifest.recipe)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def receipt(self) -> dict[str, object]:
        """What was lost on the way, as measured at export."""
        (receipt,) = self._json("receipt.json", self._text("receipt.json").split("\0"))
        return receipt

    def golden(self) -> list[Golden]:
        """The prompts with the ids they must give."""
        rows = self._json("golden.jsonl", self._text("golden.jsonl").splitlines())
        try:
            golden = [Golden(**{**row, "tokens": tuple(row["tokens"])}) for row in rows]
        except (KeyError, TypeError):
            raise self._malformed("golden.jsonl") from None
        for row in golden:
            if not (
                isinstance(row.system, str | None) and isinstance(row.prompt, str)
                and all(type(token) is int for token in row.tokens)
                and type(row.margin) in (int, float) and math.isfinite(row.margin)
            ):
                raise self._malformed("golden.jsonl")
        return golden

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise self._malformed(name) from None

    def _json(self, name: str, texts: list[str]) -> list[dict[str, Any]]:
        try:
            records = [json.loads(text) for text in texts]
        except (ValueError, RecursionError):
            raise self._malformed(name) from None
        if not all(isinstance(record, dict) for record in records):
            raise self._malformed(name)
        return records

    def _malformed(self, name: str) -> BundleCorrupt:
        return BundleCorrupt(
            f"File {name} of bundle {self.path.name} is malformed; export it again."
        )

    def _unreadable(self, name: str) -> BundleCorrupt:
        return BundleCorrupt(
            f"File {name} of bundle {self.path.name} cannot be read; check its permissions or copy "
            "the bundle again."
        )

    def _check_names(self) -> None:
        wanted = {*self.manifest.files, "manifest.json"}
        held = {entry.name for entry in self.path.iterdir()}
        for required in ("tokenizer.json", "receipt.json", "golden.jsonl"):
            if required not in wanted:
                raise ManifestInvalid(
                    f"The manifest of bundle {self.path.name} does not list {required}; export "
                    "it again."
                )
        for name in sorted(wanted - held):
            raise BundleCorrupt(
                f"Bundle {self.path.name} lacks {name}; copy or export it again."
            )
        if held - wanted:
            raise BundleCorrupt(
                f"Bundle {self.path.name} holds {len(held - wanted)} files that its manifest does "
                "not list; remove them or copy the bundle again."
            )

    def _check_file(self, name: str) -> None:
        path, entry = self.path / name, self.manifest.files[name]
        if not _regular(path):
            raise BundleCorrupt(
                f"File {name} of bundle {self.path.name} is no regular file; copy it again."
            )
        size = path.stat().st_size
        if size != entry.size:
            kind = "truncated" if size < entry.size else "too long"
            raise BundleCorrupt(
                f"File {name} of bundle {self.path.name} is {kind} ({size} bytes, not "
                f"{entry.size}); copy the bundle again."
            )
        try:
            digest = _hash(path)
        except OSError as error:
            raise self._unreadable(name) from error
        if digest != entry.sha256:
            raise BundleCorrupt(
                f"File {name} of bundle {self.path.name} is not the one its manifest names (the "
                "sha256 differs); copy the bundle again."
            )


@contextmanager
def writer(path: str | Path, *, size_bytes: int = 0, replace: bool = False) -> Iterator[Path]:
    """A directory beside `path` to write a bundle into; `path` becomes it when the block ends.

    `finish` must have written the manifest by then. On any failure nothing is left behind, and
    an older bundle at `path` stays as it was. `size_bytes` is what will be written, if known.

    Raises:
        OutputExists: `path` is taken and `replace` is false, or it is anything but a bundle.
        NotEnoughDisk: too little is free, or the disk filled up.
        BundleError: the directory of `path` cannot be written to.
    """
    path = Path(path)
    parent = path.resolve().parent
    if os.path.lexists(path):
        if not replace:
            raise OutputExists(f"Output {path.name} exists already; name another or pass --force.")
        # What is replaced is removed: never a home directory named by mistake.
        if not _regular(path / "manifest.json"):
            raise OutputExists(
                f"Output {path.name} exists and is no bundle, so it is not replaced; name another."
            )
    if not parent.is_dir():
        raise BundleError(
            f"Directory {parent.name} does not exist; create it or name another output."
        )
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        raise BundleError(
            f"Directory {parent.name} cannot be written to ({error.strerror}); name another output."
        ) from error
    try:
        free = shutil.disk_usage(parent).free
        if size_bytes > free:
            raise NotEnoughDisk(
                f"Bundle {path.name} takes {size_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
                "free; make room or name another disk."
            )
        new = work / "new"
        new.mkdir()
        yield new
        assert (new / "manifest.json").exists(), "finish() was not called"
        for entry in (*new.iterdir(), new):
            _flush(entry)
        if replace and os.path.lexists(path):
            path.rename(work / "old")
        new.rename(path)
        _flush(parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughDisk(
                f"The disk filled up while bundle {path.name} was written; make room and run it "
                "again."
            ) from error
        raise BundleError(
            f"Writing bundle {path.name} failed ({error.strerror}); check the directory."
        ) from error
    finally:
        if os.path.lexists(work / "old") and not os.path.lexists(path):
            (work / "old").rename(path)
        shutil.rmtree(work, ignore_errors=True)


def finish(directory: Path, build: Callable[..., Manifest]) -> None:
    """Hash the files in `directory`, and write the manifest that `build(files=...)` gives."""
    files = {
        entry.name: FileEntry(sha256=_hash(entry), size=entry.stat().st_size)
        for entry in sorted(directory.iterdir())
    }
    (directory / "manifest.json").write_text(build(files=files).to_json(), "utf-8")


def rewrite_receipt(bundle: Bundle, receipt: dict[str, object]) -> Bundle:
    """The same bundle with another receipt, in its place; its model id stays.

    Raises:
        NotEnoughDisk, BundleError: see `writer`; the bundle is as before.
    """
    names = [name for name in bundle.manifest.files if name != "receipt.json"]
    size = sum(bundle.manifest.files[name].size for name in names)
    with writer(bundle.path, size_bytes=size, replace=True) as directory:
        for name in names:
            shutil.copyfile(bundle.path / name, directory / name)
        (directory / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", "utf-8")
        finish(directory, lambda files: dataclasses.replace(bundle.manifest, files=files))
    return Bundle.open(bundle.path)


def write_golden(path: Path, rows: list[Golden]) -> None:
    """Write `golden.jsonl`."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), "utf-8")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seen(path: Path) -> dict[str, str]:
    """Programs seen before; a damaged memory is an empty one, and they are hashed again."""
    try:
        seen = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return seen if isinstance(seen, dict) else {}


def _remember(path: Path, seen: dict[str, str]) -> None:
    """Keep the memory; a home that cannot be written to only costs a hash at the next load."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(seen, file)
        os.replace(file.name, path)  # noqa: PTH105  # the atomic one, by its name
    except OSError:
        return
