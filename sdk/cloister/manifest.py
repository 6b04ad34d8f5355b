"""The manifest of a bundle: what it says, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping  # noqa: TC003  # read at run time, like every type below
from typing import TYPE_CHECKING

from cloister import records
from cloister.backend import CLOISTER, KV
from cloister.errors import BundleVersionError, ManifestInvalid, SettingError
from cloister.pieces import MediaFormats  # noqa: TC001
from cloister.records import Label, Record, Sha256, Whole
from cloister.tiers import Shape  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FORMAT", "LIMIT_BYTES", "Around", "Encoder", "FileEntry", "Manifest", "ProgramEntry",
           "PromptFormat", "modalities"]

FORMAT = 2
LIMIT_BYTES = 1 << 20
_LATER_BYTES = 64 << 20  # what a process grows by after it was loaded
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Encoder(Record, frozen=True):
    """A method that makes vectors of pictures or recordings, and what it takes once it is used."""

    method: Label
    weight_bytes: Whole
    arena_bytes: Whole


class ProgramEntry(Record, frozen=True):
    """An ExecuTorch program, what it needs and what it takes."""

    file: Label
    backend: Label
    methods: tuple[Label, ...]
    operator_abi: Whole  # of the operators that it calls; see `cloister.backend`
    weight_bytes: Whole
    kv_bytes: Whole  # for the whole context
    arena_bytes: Whole  # activations planned by the exporter
    note: Label | None = None  # what a reader must know: `cloister.backend.NEVER_RUN`
    encoders: tuple[Encoder, ...] = ()  # apart from the weights and activations above
    kv: KV = KV.FLOAT32

    def required_bytes(self, shape: Shape, *, methods: int = 1) -> int:
        """Memory that loading takes for good: weights as the backend packs them, KV, activations.

        XNNPACK packs the weights again for each method it loads. The file's own pages can be
        evicted and do not count, but those of the embedding and of the largest matrix while it is
        packed: ExecuTorch locks what it reads (executorch 1.4.1,
        `extension/pybindings/pybindings.cpp`). Without them a model of 1.8 B weights was ended by
        limits from 1.28 to 1.45 GB. Programs of Cloister's own operators pack nothing: there it is
        the file's pages that are locked, once.
        """
        if self.backend == CLOISTER.name:
            return self.weight_bytes + self.kv_bytes + self.arena_bytes + _LATER_BYTES
        locked = 2 * shape.vocab_size * shape.hidden_size
        return (methods * self.weight_bytes + self.kv_bytes + self.arena_bytes
                + locked + _LATER_BYTES)


class FileEntry(Record, frozen=True):
    """What a file must be."""

    sha256: Sha256
    size: Whole  # bytes


class Around(Record, frozen=True):
    """What stands before and after a text."""

    before: str
    after: str


class PromptFormat(Record, frozen=True):
    """A chat template said in strings, for runners without Jinja (see `cloister.prompt_format`).

    A conversation is `begin`, unless its first message is the system's, then each message's text
    between the strings of its role, then `answer`. With `strip`, texts lose the white space at
    both ends first.
    """

    begin: str
    system: Around | None  # None: the template refuses a system message, or leaves it out
    user: Around
    assistant: Around
    answer: str
    strip: bool


class Manifest(Record, frozen=True):
    """What `manifest.json` says of a bundle."""

    format: int
    name: Label  # of the tier or model
    shape: Shape
    context: Whole  # tokens
    prefill_chunk: Whole  # most tokens in one call
    recipe: Label
    programs: tuple[ProgramEntry, ...]  # in order of preference
    executorch: Label  # release that made the programs
    bos: Whole | None
    eos: tuple[Whole, ...]
    special_ids: tuple[Whole, ...]  # of the tokenizer's special tokens, which are no text
    prompt_format: PromptFormat | None
    prompt_format_reason: str | None  # why there is none
    modalities: tuple[Label, ...]
    parent: Sha256  # identity of the checkpoint
    files: Mapping[str, FileEntry]  # every other file of the bundle
    special_tokens: Mapping[str, str] | None = None  # that the template is given, by name
    media: MediaFormats | None = None  # None: it reads text only

    def __post_init__(self) -> None:
        _need(1 <= self.prefill_chunk <= self.context, "prefill_chunk is not within the context")
        _need(self.context == self.shape.context, "context differs from the shape's")
        _need(bool(self.programs), "it lists no program")
        _need(
            all(text.isprintable() for text in self._labels()), "a text is not printable in a line"
        )
        tokens = (*self.eos, *self.special_ids, *([] if self.bos is None else [self.bos]))
        _need(all(token < self.shape.vocab_size for token in tokens), "a token id is out of range")
        _need(
            (self.prompt_format is None) == (self.prompt_format_reason is not None),
            "it must have a prompt format or a reason why not",
        )
        _need(
            all(_NAME.fullmatch(file) and file != "manifest.json" for file in self.files),
            "a file name is not a plain name inside the bundle",
        )
        _need(
            sorted(program.file for program in self.programs)
            == sorted(file for file in self.files if file.endswith(".pte")),
            "its programs are not the .pte files that it lists",
        )
        _need(
            self.modalities == modalities(self.media), "its modalities are not those of its media")

    @property
    def size_bytes(self) -> int:
        """Bytes of every file of the bundle but this one."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        """The text of `manifest.json`; the same manifest always gives the same text."""
        return records.to_json(self)

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            BundleVersionError: a format that this release does not know.
            ManifestInvalid: anything else that is not as the format says.
        """
        record = records.parse(raw, limit_bytes=LIMIT_BYTES, refuse=_refuse)
        version = record.get("format")
        if version != FORMAT or type(version) is not int:
            earlier = type(version) is int and 1 <= version < FORMAT
            raise BundleVersionError(
                "The bundle was made by an earlier release of Cloister; export its checkpoint "
                "again with this one." if earlier else
                f"The bundle's format is not {FORMAT}, the one this release of Cloister reads; "
                "export it again or install the release that made it."
            )
        return records.build(record, cls, refuse=_refuse)

    def _labels(self) -> Iterable[str]:
        yield from (self.name, self.recipe, self.executorch, *self.modalities)
        yield self.prompt_format_reason or ""
        for program in self.programs:
            yield from (program.file, program.backend, *program.methods, program.note or "")
            yield from (encoder.method for encoder in program.encoders)


def modalities(media: MediaFormats | None) -> tuple[str, ...]:
    """Return the names of what is read: text, and what `media` says."""
    named = {} if media is None else {"picture": media.picture, "recording": media.recording}
    return ("text", *(name for name, format_ in named.items() if format_ is not None))


def _need(condition: bool, complaint: str) -> None:
    if not condition:
        raise SettingError(complaint)  # which `records.build` gives to `_refuse`


def _refuse(complaint: str) -> ManifestInvalid:
    return ManifestInvalid(
        f"The bundle's manifest cannot be used ({complaint.rstrip('.')}); export or copy the "
        "bundle again."
    )
