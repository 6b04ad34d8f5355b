"""An engine: one bundle, loaded, with one set of KV buffers.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cloister.bundle import Bundle
from cloister.errors import ContextExceeded, EmptyPrompt, SnapshotError
from cloister.runtime import _executorch, memory
from cloister.settings import Settings
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloister.manifest import ProgramEntry
    from cloister.runtime.program import Program

__all__ = ["Engine"]


class _Load(Protocol):
    def __call__(self, path: Path, layers: int, *, threads: int | None) -> Program: ...


class Engine:
    """A loaded bundle. Not for use from several threads at once.

    The KV buffers belong to the engine: sessions that take turns on it each find what the other
    left, and read again only where their texts part.

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
        load: _Load = _executorch.load,
        runs_here: Callable[[ProgramEntry], bool] = _executorch.runs_here,
    ) -> None:
        self.bundle = Bundle.open(path)
        manifest = self.bundle.manifest
        self._entry = self.bundle.program(runs_here)
        self.bundle.check_program(self._entry, settings or Settings.from_environment())
        self.tokenizer = Tokenizer.from_files(
            self.bundle.tokenizer_path, self.bundle.template_path
        )
        self.tokenizer.check_vocabulary(manifest.shape.vocab_size)
        self._available = available_bytes
        self._check_memory(methods=1)
        self._program = load(
            self.bundle.path / self._entry.file, manifest.shape.layers, threads=threads
        )
        self._scores = False  # whether `score` was given its memory
        self._held: list[int] = []  # ids whose keys and values the buffers hold

    def __repr__(self) -> str:
        return f"Engine({self.bundle.path.name!r})"

    @property
    def context(self) -> int:
        """Most tokens, prompt and answer together."""
        return self.bundle.manifest.context

    @property
    def backend(self) -> str:
        """The backend in use."""
        return self._entry.backend

    @property
    def model_id(self) -> str:
        """What sealed state is bound to (see `Bundle.model_id`)."""
        return self.bundle.model_id(self._entry)

    def logits(
        self, ids: Sequence[int], *, stopped: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Logits after `ids`, float32[V]; None if `stopped` said so before they were read.

        Ids that the buffers hold already, from the front, are not read again.

        Raises:
            EmptyPrompt: no ids.
            ContextExceeded: more ids than the context holds.
        """
        if not ids:
            raise EmptyPrompt("There are no tokens to read; give at least one.")
        if len(ids) > self.context:
            raise ContextExceeded(
                f"The text has {len(ids)} tokens and the context holds {self.context}; shorten it."
            )
        common = min(len(self._held), len(ids) - 1)  # the last one is read for its logits
        if self._held[:common] != list(ids[:common]):
            pairs = zip(self._held, ids, strict=False)
            common = next(i for i, (held, wanted) in enumerate(pairs) if held != wanted)
        del self._held[common:]
        logits = None
        for start in range(common, len(ids), self.bundle.manifest.prefill_chunk):
            if stopped():
                return None
            part = list(ids[start:start + self.bundle.manifest.prefill_chunk])
            logits = self._program.forward(torch.tensor([part]), start)
            self._held += part
        assert logits is not None
        return logits[0]

    def score(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits after each of `ids`, float32[T, V] a chunk, from an empty context.

        Raises:
            ContextExceeded: more ids than the context holds.
            NotEnoughMemory: loading the second method would need more than is available.
        """
        if len(ids) > self.context:
            raise ContextExceeded(
                f"The text has {len(ids)} tokens and the context holds {self.context}; shorten it."
            )
        if not self._scores:  # one more copy of the weights, once
            self._check_memory(methods=1)
            self._scores = True
        self._held.clear()
        chunk = self.bundle.manifest.prefill_chunk
        for start in range(0, len(ids), chunk):
            part = list(ids[start:start + chunk])
            yield self._program.score(torch.tensor([part]), start)[0]
            self._held += part

    @property
    def held(self) -> list[int]:
        """The ids whose keys and values the buffers hold."""
        return list(self._held)

    def rows(self, start: int, stop: int) -> list[torch.Tensor]:
        """Live views of the keys and values of positions, float32[T, G, D] each, in one order."""
        buffers = self._program.kv_buffers()
        return [buffers[name][0, start:stop] for name in sorted(buffers)]

    def hold(self, ids: Sequence[int]) -> None:
        """Say whose keys and values were written through `rows`: those of `ids`, from the front.

        Raises:
            ContextExceeded: more ids than the context holds.
        """
        if len(ids) > self.context:
            raise ContextExceeded(
                f"The text has {len(ids)} tokens and the context holds {self.context}; shorten it."
            )
        self._held = list(ids)

    def snapshot(self) -> bytes:
        """The KV state so far, as safetensors with the ids it stands for and the model's id.

        It inverts back to the text: seal it before it goes anywhere.
        """
        length = len(self._held)
        tensors = {
            name: buffer[:, :length].clone() for name, buffer in self._program.kv_buffers().items()
        }
        tensors["ids"] = torch.tensor(self._held, dtype=torch.int64)
        data: bytes = save_tensors(tensors, {"model_id": self.model_id})
        return data

    def restore(self, snapshot: bytes) -> None:
        """Continue from `snapshot`: the next logits are those that would have come, to the bit.

        Raises:
            SnapshotError: malformed, or of another model; the engine is as before.
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
        ids, buffers = tensors.pop("ids", None), self._program.kv_buffers()
        if ids is None or ids.dtype != torch.int64 or set(tensors) != set(buffers):
            raise wrong
        length = ids.numel()
        if ids.dim() != 1 or length > self.context:
            raise wrong
        for name, rows in tensors.items():
            buffer = buffers[name]
            if rows.dtype != buffer.dtype or rows.shape != buffer[:, :length].shape:
                raise wrong
        for name, rows in tensors.items():
            buffers[name][:, :length] = rows
        self._held = ids.tolist()

    def _check_memory(self, *, methods: int) -> None:
        available = memory.available_bytes() if self._available is None else self._available
        memory.check(
            self.bundle.path.name, memory.required_bytes(self._entry, methods=methods), available
        )
