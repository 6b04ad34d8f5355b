"""An engine: one bundle, loaded, with one set of KV buffers."""

from __future__ import annotations

import functools
import json
import secrets
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cloister.backend import CLOISTER
from cloister.bundle import Bundle
from cloister.errors import SnapshotError, UnsupportedMedia, VocabularyMismatch
from cloister.parts import Picture, one_by_one
from cloister.pieces import MEDIA
from cloister.runtime import encoded, memory, program
from cloister.runtime.core import Core, Rows
from cloister.runtime.draft import AUTO, LOOKUP, OFF, Lookup, LowerTier
from cloister.runtime.encoded import Encoded
from cloister.runtime.speculation import Estimates, Speculation
from cloister.settings import Settings
from cloister.summary import Summary
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from cloister.manifest import ProgramEntry
    from cloister.pieces import PictureFormat, RecordingFormat
    from cloister.runtime.chat import Ask
    from cloister.runtime.constraint import Grammars
    from cloister.runtime.core import MediaPosition, Position
    from cloister.runtime.draft import Guesser
    from cloister.runtime.encoded import Kept, Medium
    from cloister.runtime.generate import Drafter
    from cloister.runtime.program import Program
    from cloister.runtime.sampling import Constraint

__all__ = ["Engine"]


class _Load(Protocol):
    def __call__(self, path: Path, layers: int, *, threads: int | None) -> Program: ...


class Engine(Core, Summary):
    """A loaded bundle.

    The KV buffers belong to the engine: sessions that take turns on it each find what the other
    left, and read again only where their texts part. One thread, and one unfinished answer, at a
    time: the second is refused by name.

    `draft` is what guesses tokens, of which several are then read in one call: `lookup` (what
    followed the same words before), `off`, the bundle of a lower tier, beside lookup, or `auto`:
    lookup where the program calls Cloister's own operators. No token depends on it there, and up to
    the rounding of longer calls with XNNPACK, which packs the weights a second time for it.

    Raises:
        BundleError: see `Bundle.open` and `Bundle.program`.
        VocabularyMismatch: the lower tier has another tokenizer.
        TokenizerError: the tokenizer cannot be read, or does not fit the model.
        NotEnoughMemory: loading would need more than is available.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        settings: Settings | None = None,
        threads: int | None = None,
        available_bytes: int | None = None,
        draft: str | Path = AUTO,
        load: _Load = program.load,
        runs_here: Callable[[ProgramEntry], bool] = program.runs_here,
    ) -> None:
        self.bundle = Bundle.open(path)
        manifest = self.bundle.manifest
        self._entry = self.bundle.program(runs_here)
        self.bundle.check_program(self._entry, settings or Settings.from_environment())
        self.tokenizer = Tokenizer.from_files(
            self.bundle.tokenizer_path, self.bundle.template_path, manifest
        )
        self.tokenizer.check_vocabulary(manifest.shape.vocab_size)
        self._available = available_bytes
        if draft == AUTO:
            draft = LOOKUP if self._entry.backend == CLOISTER.name else OFF
        self._check_memory(methods=1 if draft == OFF else 2)
        self._lower: Engine | None = None
        if draft not in (LOOKUP, OFF):
            self._lower = Engine(
                draft, settings=settings, threads=threads, available_bytes=available_bytes,
                draft=OFF, load=load, runs_here=runs_here)
            self._check_lower(self._lower)
        program = load(
            self.bundle.path / self._entry.file, manifest.shape.layers, threads=threads
        )
        super().__init__(
            program, name=self.bundle.path.name, context=manifest.context,
            chunk=manifest.prefill_chunk, reads_media=manifest.media is not None)
        self._grammars: Grammars | None = None  # made at the first constraint
        self._given = {"forward"}  # methods that were given their memory
        self._estimates = None if draft == OFF else Estimates()
        if draft != OFF:
            self._given.add("score")
        self._media_key = secrets.token_bytes(32)
        self._counts = dict[bytes, int]()  # vectors by digest, where the format does not say

    def __repr__(self) -> str:
        return f"Engine({self.bundle.path.name!r})"

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return what is loaded, and how much of the context is in use."""
        yield from self.bundle.summary()
        yield "backend in use", self.backend
        yield "model id", self.model_id
        yield "drafts by", self.drafts_by
        yield "KV buffers hold", f"{len(self.cached):,} tokens"

    @property
    def backend(self) -> str:
        """The backend in use."""
        return self._entry.backend

    @property
    def drafts_by(self) -> str:
        """What guesses tokens: `lookup`, `off`, or the name of a lower tier's bundle."""
        if self._lower is not None:
            return self._lower.name
        return OFF if self._estimates is None else LOOKUP

    @property
    def model_id(self) -> str:
        """What sealed state is bound to (see `Bundle.model_id`)."""
        return self.bundle.model_id(self._entry)

    def constraint(self, ask: Ask) -> Constraint | None:
        """Build what holds an answer to the schema, grammar, choices or tools of `ask`, if any.

        Raises:
            ConstraintError: it cannot be followed, or not with this bundle's tokenizer.
        """
        if all(part is None for part in ask.constraints):
            return None
        from cloister.runtime.constraint import Grammars

        if self._grammars is None:
            manifest = self.bundle.manifest
            self._grammars = Grammars(
                self.tokenizer, vocabulary=manifest.shape.vocab_size, end=manifest.eos,
                name=self.name)
        return self._grammars.of(ask)

    def drafter(self) -> Drafter | None:
        """Return what guesses the tokens of one answer; None where drafting is off."""
        if self._estimates is None:
            return None
        manifest = self.bundle.manifest
        guessers: list[Guesser] = [Lookup(manifest.eos)]
        if self._lower is not None:
            guessers.append(LowerTier(
                self._lower, vocabulary=manifest.shape.vocab_size, end=manifest.eos))
        return Speculation(guessers, self._estimates)

    def media(self, part: Medium, kept: Kept | None = None) -> list[MediaPosition]:
        """Return the positions of a picture or recording, one for each of its vectors.

        Nothing is encoded before they are read, and then only what `kept` does not have; but where
        the encoder leaves out what says nothing, it is once, to know how many there are. Two are
        the same where key and content are: the key is that of `kept`, or this engine's own.

        Raises:
            UnsupportedMedia, MediaTooLarge: see `MediaFormats.layout`.
        """
        form, count = self._format(part)
        if isinstance(part, Picture) and part.lines > 1:
            return [position for line in one_by_one([part]) for position in self.media(line, kept)]
        name = encoded.digest(self._media_key if kept is None else kept.media_key, part)
        vectors = Encoded(name, functools.partial(self._encode, part, form), kept)
        if form.fewer:
            if name not in self._counts:
                self._counts[name] = len(vectors[0:])
            count = self._counts[name]
        return encoded.positions(form, name, vectors, count)

    def positions(
        self, ids: Sequence[int], parts: Iterable[Medium], kept: Kept | None = None
    ) -> list[Position]:
        """Return `ids` with the positions of `parts` in place of each `MEDIA`, in their order.

        Where an encoder leaves some out, they are fewer than `MediaFormats.layout` says.

        Raises:
            UnsupportedMedia, MediaTooLarge: see `media`.
        """
        places: list[MediaPosition | None] = []
        for part in one_by_one(parts):
            found = self.media(part, kept)
            places += [*found, *[None] * (self._format(part)[1] - len(found))]
        next_place = iter(places)
        return [
            position for id_ in ids
            if (position := next(next_place) if id_ == MEDIA else id_) is not None]

    def snapshot(self) -> bytes:
        """Return the KV state so far, as safetensors with its ids and the model's id.

        It inverts back to the text: seal it before it goes anywhere.

        Raises:
            SnapshotError: it holds pictures or recordings.
            EngineBusy: another thread is using the engine.
        """
        with self.exclusive():
            cached, buffers = self.cached, self.program.kv_buffers()
            tensors = {name: buffer[:, :len(cached)].clone() for name, buffer in buffers.items()}
        if not all(isinstance(position, int) for position in cached):
            raise SnapshotError("A picture or recording has no snapshot; read the text again.")
        tensors["ids"] = torch.tensor(cached, dtype=torch.int64)
        data: bytes = save_tensors(tensors, {"model_id": self.model_id})
        return data

    def restore(self, snapshot: bytes) -> None:
        """Continue from `snapshot`: the next logits are those that would have come, to the bit.

        Raises:
            SnapshotError: malformed, or of another model; the engine is as before.
            EngineBusy: another thread is using the engine.
        """
        wrong = SnapshotError(
            f"The KV state does not belong to bundle {self.bundle.path.name}; read the text again."
        )
        try:
            tensors = load_tensors(snapshot)  # refuses a malformed header first
            header = json.loads(snapshot[8:8 + int.from_bytes(snapshot[:8], "little")])
            if header["__metadata__"]["model_id"] != self.model_id:
                raise wrong
        except (SafetensorError, ValueError, KeyError):
            raise wrong from None
        ids, buffers = tensors.pop("ids", None), self.program.kv_buffers()
        if ids is None or ids.dtype != torch.int64 or set(tensors) != set(buffers):
            raise wrong
        length = ids.numel()
        if ids.dim() != 1 or length > self.context:
            raise wrong
        for name, rows in tensors.items():
            buffer = buffers[name]
            if rows.dtype != buffer.dtype or rows.shape != buffer[:, :length].shape:
                raise wrong
        with self.exclusive():
            for name, rows in tensors.items():
                buffers[name][:, :length] = rows
            self._cached = ids.tolist()

    def _check_lower(self, lower: Engine) -> None:
        if lower.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise VocabularyMismatch(
                f"Bundle {lower.name} has another tokenizer than {self.bundle.path.name} and "
                "cannot guess its tokens; name a lower tier of the same family.")

    def _format(self, part: Medium) -> tuple[PictureFormat | RecordingFormat, int]:
        """Return the format of a picture or recording, and the most vectors that it has."""
        media = self.bundle.manifest.media
        if media is None:
            raise UnsupportedMedia(
                f"Bundle {self.name} reads text only; name one that reads pictures or sound.")
        return media.of(part), media.vectors(part)

    def _encode(self, part: Medium, form: PictureFormat | RecordingFormat) -> torch.Tensor:
        self._give("vision_encoder" if isinstance(part, Picture) else "audio_encoder")
        return encoded.encode(self.program, form, part)

    def _read(self, part: Sequence[Position], start: int, rows: Rows) -> torch.Tensor:
        media = not isinstance(part[0], int)
        if self.reads_media or not media:
            self._give("text_decoder" if media else "score" if rows is Rows.ALL else "forward")
        return super()._read(part, start, rows)

    def _give(self, method: str) -> None:
        """Check before the first use of a method that there is the memory it takes.

        Those of the decoder take one more copy of the weights.
        """
        if method in self._given:
            return
        encoder = next((each for each in self._entry.encoders if each.method == method), None)
        if encoder is None:
            self._check_memory(methods=1)
        else:
            memory.check(
                self.name, encoder.weight_bytes + encoder.arena_bytes, self._available_bytes())
        self._given.add(method)

    def _check_memory(self, *, methods: int) -> None:
        required = self._entry.required_bytes(
            self.bundle.manifest.shape, methods=methods)
        memory.check(self.bundle.path.name, required, self._available_bytes())

    def _available_bytes(self) -> int:
        return memory.available_bytes() if self._available is None else self._available
