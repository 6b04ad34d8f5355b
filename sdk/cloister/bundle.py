"""Bundles: a directory that a notebook or a phone app runs, and that can prove what it is.

    manifest.json                         what it holds, with the sha256 and size of every file
    program.BACKEND.pte                   ExecuTorch programs
    tokenizer.json, chat_template.jinja   as the host and the C++ tokenizers read them
    tokenizer_config.json                 both for React Native
    receipt.json                          what was lost on the way, measured on this program
    golden.jsonl                          prompts with the ids they must give

No torch, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from cloister import family, records
from cloister.backend import CLOISTER
from cloister.errors import (
    BundleCorrupt,
    BundleError,
    CloisterError,
    IncompatibleProgram,
    ManifestInvalid,
)
from cloister.files import is_regular, whole_directory, whole_file
from cloister.manifest import LIMIT_BYTES, FileEntry, Manifest, ProgramEntry
from cloister.records import Finite, Record, Whole
from cloister.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cloister.progress import Report
    from cloister.settings import Settings

__all__ = ["Bundle", "Golden", "Pattern", "finish", "rewrite_receipt", "write_golden",
           "write_receipt", "writer"]

_PROGRAM = ".pte"
_WHY = "; `cloister kernels build` says why Cloister's own operators do not"
_TEMPLATE = "chat_template.jinja"
EXECUTORCH = (1, 4)  # the minor release that we run
_RECEIPT_BYTES = 16 << 20
_SEEN_BYTES = 1 << 20


class Pattern(Record, frozen=True):
    """A picture or recording of `cloister.pattern`."""

    kind: Literal["picture", "recording"]
    seed: Whole


class Golden(Record, frozen=True, omit_defaults=True):
    """The ids of a public prompt, and those that greedy decoding must give.

    Ids and not text: a chat template may write the date.
    """

    prompt: tuple[Whole, ...]
    tokens: tuple[Whole, ...]
    margin: Finite  # smallest gap between the two best logits, over all steps
    media: Pattern | None = None  # that stands before the prompt


class Bundle(Summary):
    """An opened bundle: its manifest read, its small files hashed.

    Raises (from `open` and the methods):
        BundleError: not a bundle.
        ManifestInvalid, BundleVersionError: see `Manifest.from_json`.
        BundleCorrupt: a file is missing, unexpected, truncated or altered.
    """

    def __init__(self, path: Path, manifest: Manifest, report: Report | None = None) -> None:
        self.path, self.manifest = path, manifest
        self.report = report  # what the export measured; None where it was opened from disk

    def __repr__(self) -> str:
        return f"Bundle({self.path.name!r})"

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return what the manifest says."""
        said = self.manifest
        yield from (
            ("bundle", self.path.name), ("tier or model", said.name), ("recipe", said.recipe),
            ("size", f"{said.size_bytes:,} bytes"),
            ("weights", f"{said.shape.parameters:,}, embedding and head apart"),
            ("context", f"{said.context:,} tokens"))
        for entry in said.programs:
            yield f"program for {entry.backend}", (
                f"{entry.weight_bytes:,} bytes, and {entry.kv_bytes + entry.arena_bytes:,} of KV "
                f"buffers and activations{f'; {entry.note}' if entry.note else ''}")
        yield "ExecuTorch", said.executorch
        yield "checkpoint", said.parent

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the bundle in `path`, or of a shipped tier, and hash every file but the programs."""
        path = family.bundle(path)
        try:
            if not is_regular(path / "manifest.json"):  # a pipe would be waited for
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
        return self.path / _TEMPLATE if _TEMPLATE in self.manifest.files else None

    def program(self, runs_here: Callable[[ProgramEntry], bool]) -> ProgramEntry:
        """The first program that `runs_here`.

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
            if runs_here(entry):
                return entry
        names = ", ".join(
            f"{entry.backend} ({entry.note or f'operators {entry.operator_abi}'})"
            for entry in self.manifest.programs
        )
        own = any((entry.backend, entry.operator_abi) == (CLOISTER.name, CLOISTER.operator_abi)
                  for entry in self.manifest.programs)
        raise IncompatibleProgram(
            f"Bundle {self.path.name} has programs for {names} only, and none of these runs on "
            "this machine with this release; export it again or for another backend"
            f"{_WHY if own else ''}."
        )

    def check_program(self, entry: ProgramEntry, settings: Settings) -> None:
        """Hash a program, unless this machine has seen this very file before."""
        try:
            stat = (self.path / entry.file).lstat()
        except OSError as error:
            raise self._unreadable(entry.file) from error
        # The change time as well: the modification time can be set back by anybody.
        key = ":".join(map(str, (
            stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        )))
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
        """sha256 over all that decides what an answer is, in hex.

        That is the program in use, the tokenizer, the chat template, the recipe, the tokens that
        begin and end a text, and those that the template is given by name. What sealed state is
        bound to: a new receipt does not change it.
        """
        manifest = self.manifest
        hashes = [
            file.sha256 if (file := manifest.files.get(name)) else None
            for name in (entry.file, "tokenizer.json", _TEMPLATE)
        ]
        parts: list[object] = [*hashes, manifest.recipe, manifest.bos, manifest.eos]
        if manifest.special_tokens is not None:
            parts.append(sorted(manifest.special_tokens.items()))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def receipt(self) -> dict[str, object]:
        """What was lost on the way, as measured at export."""
        return records.parse(
            self._read("receipt.json"), limit_bytes=_RECEIPT_BYTES,
            refuse=lambda complaint: self._malformed("receipt.json"),
        )

    def golden(self) -> list[Golden]:
        """The prompts with the ids they must give."""
        rows = records.decode_lines(
            self._read("golden.jsonl"), Golden, limit_bytes=LIMIT_BYTES,
            refuse=lambda complaint: self._malformed("golden.jsonl"),
        )
        top = self.manifest.shape.vocab_size
        media = {None, *(self.manifest.modalities[1:])}
        if not all(
            row.prompt and max(*row.prompt, *row.tokens, 0) < top
            and (row.media and row.media.kind) in media for row in rows
        ):
            raise self._malformed("golden.jsonl")
        return rows

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise self._unreadable(name) from error

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
        if not is_regular(path):
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

    `finish` must have written the manifest by then.

    Raises:
        OutputExists, NotEnoughDisk, OutputUnwritable: see `cloister.files.whole_directory`.
    """
    with whole_directory(
        Path(path), kind="bundle", size_bytes=size_bytes, replace=replace
    ) as directory:
        yield directory
        assert (directory / "manifest.json").exists(), "finish() was not called"


def finish(directory: Path, build: Callable[..., Manifest]) -> None:
    """Hash the files in `directory`, and write the manifest that `build(files=...)` gives.

    Raises:
        SettingError, ManifestInvalid: a value that the format does not hold.
    """
    files = {
        entry.name: FileEntry(sha256=_hash(entry), size=entry.stat().st_size)
        for entry in sorted(directory.iterdir())
    }
    text = build(files=files).to_json()
    Manifest.from_json(text.encode())  # what cannot be opened is not written
    (directory / "manifest.json").write_text(text, "utf-8")


def rewrite_receipt(bundle: Bundle, receipt: dict[str, object]) -> Bundle:
    """The same bundle with another receipt, in its place; its model id stays.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `writer`; the bundle is as before.
    """
    names = [name for name in bundle.manifest.files if name != "receipt.json"]
    size = sum(bundle.manifest.files[name].size for name in names)
    with writer(bundle.path, size_bytes=size, replace=True) as directory:
        for name in names:
            shutil.copyfile(bundle.path / name, directory / name)
        write_receipt(directory, receipt)
        finish(directory, lambda files: msgspec.structs.replace(bundle.manifest, files=files))
    return Bundle.open(bundle.path)


def write_receipt(directory: Path, receipt: dict[str, object]) -> None:
    """Write `receipt.json` into the directory of a new bundle."""
    text = msgspec.json.format(msgspec.json.encode(receipt), indent=1)  # null for what is no number
    (directory / "receipt.json").write_bytes(text + b"\n")


def write_golden(directory: Path, rows: Sequence[Golden]) -> None:
    """Write `golden.jsonl` into the directory of a new bundle."""
    lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    (directory / "golden.jsonl").write_bytes(lines)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seen(path: Path) -> dict[str, str]:
    """Programs seen before; a damaged memory is an empty one, and they are hashed again."""
    try:
        record = records.parse(path.read_bytes(), limit_bytes=_SEEN_BYTES, refuse=ValueError)
        return records.build(record, dict[str, str], refuse=ValueError)
    except (OSError, ValueError):
        return {}


def _remember(path: Path, seen: dict[str, str]) -> None:
    """Keep the memory; a home that cannot be written to only costs a hash at the next load."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(seen).encode())
    except (OSError, CloisterError):
        return
