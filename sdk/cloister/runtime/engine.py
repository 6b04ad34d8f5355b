"""An engine: one bundle, loaded, with one set of KV buffers."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cloister.bundle import Bundle
from cloister.errors import MediaTooLarge, SnapshotError, UnsupportedMedia
from cloister.parts import Picture
from cloister.runtime import encoded, memory, program
from cloister.runtime.core import Core, Rows
from cloister.settings import Settings
from cloister.summary import Summary
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloister.manifest import ProgramEntry
    from cloister.parts import Recording
    from cloister.pieces import PictureFormat, RecordingFormat
    from cloister.runtime.chat import Ask
    from cloister.runtime.constraint import Grammars
    from cloister.runtime.core import MediaPosition, Position
    from cloister.runtime.encoded import Kept
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

    Raises:
        BundleError: see `Bundle.open` and `Bundle.program`.
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
        self._check_memory(methods=1)
        program = load(
            self.bundle.path / self._entry.file, manifest.shape.layers, threads=threads
        )
        super().__init__(
            program, name=self.bundle.path.name, context=manifest.context,
            chunk=manifest.prefill_chunk, reads_media=manifest.media is not None)
        self._grammars: Grammars | None = None  # made at the first constraint
        self._given = {"forward"}  # methods that were given their memory
        self._media_key = secrets.token_bytes(32)

    def __repr__(self) -> str:
        return f"Engine({self.bundle.path.name!r})"

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return what is loaded, and how much of the context is in use."""
        yield from self.bundle.summary()
        yield "backend in use", self.backend
        yield "model id", self.model_id
        yield "KV buffers hold", f"{len(self.cached):,} tokens"

    @property
    def backend(self) -> str:
        """The backend in use."""
        return self._entry.backend

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

    def media(self, part: Picture | Recording, kept: Kept | None = None) -> list[MediaPosition]:
        """Return the positions of a picture or recording, one for each of its vectors.

        Nothing is encoded before they are read, and then only what `kept` does not have. Two are
        the same where key and content are: the key is that of `kept`, or this engine's own.

        Raises:
            UnsupportedMedia: the bundle does not read it, or not of that size or rate.
            MediaTooLarge: the recording is longer than the encoder takes.
        """
        name = encoded.digest(self._media_key if kept is None else kept.media_key, part)
        if isinstance(part, Picture):
            picture = self._picture_format(part)
            return encoded.positions(
                name, part.tiles * picture.tokens, lambda: self._see(part),
                together=picture.tokens if picture.both_ways else 1, kept=kept)
        recording = self._recording_format(part)
        samples = recording.padded(part.samples)
        return encoded.positions(
            name, samples // recording.samples_per_token, lambda: self._hear(part, samples),
            kept=kept)

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

    def _picture_format(self, picture: Picture) -> PictureFormat:
        media = self.bundle.manifest.media
        if media is None or media.picture is None:
            raise UnsupportedMedia(
                f"Bundle {self.name} reads no pictures; name one that does, or leave them out.")
        wanted = media.picture
        if (picture.height, picture.width) != (wanted.height, wanted.width) or (
                wanted.tiles is None and picture.grid != (0, 0)):
            raise UnsupportedMedia(
                f"A picture is of {picture.tiles} tiles of {picture.height} x {picture.width} "
                f"pixels and bundle {self.name} reads {wanted.height} x {wanted.width}; decode it "
                "again for this bundle.")
        return wanted

    def _recording_format(self, recording: Recording) -> RecordingFormat:
        media = self.bundle.manifest.media
        if media is None or media.recording is None:
            raise UnsupportedMedia(
                f"Bundle {self.name} reads no recordings; name one that does, or leave them out.")
        wanted = media.recording
        if recording.rate != wanted.rate:
            raise UnsupportedMedia(
                f"A recording has {recording.rate} samples a second and bundle {self.name} reads "
                f"{wanted.rate}; decode it again for this bundle.")
        if wanted.padded(recording.samples) > wanted.most:
            raise MediaTooLarge(
                f"A recording has {recording.samples / wanted.rate:.1f} seconds and bundle "
                f"{self.name} takes {wanted.most / wanted.rate:.1f}; give a shorter one.")
        return wanted

    def _see(self, picture: Picture) -> torch.Tensor:
        """Encode a picture tile by tile, float32[N, E]."""
        pixels = torch.frombuffer(bytearray(picture.data), dtype=torch.uint8)
        tiles = pixels.view(picture.tiles, 1, 3, picture.height, picture.width)
        self._give("vision_encoder")
        return torch.cat([self.program.see(tile)[0].clone() for tile in tiles])

    def _hear(self, recording: Recording, samples: int) -> torch.Tensor:
        """Encode a recording behind which there is silence up to `samples`, float32[N, E]."""
        padded = torch.zeros(1, 1, samples)
        padded[0, 0, :recording.samples] = torch.frombuffer(
            bytearray(recording.data), dtype=torch.float32)
        self._give("audio_encoder")
        return self.program.hear(padded)[0].clone()

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
