"""From a quantized decoder to the program of a bundle."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from cloister import backend as backends
from cloister.errors import ExportError, SettingError
from cloister.export.backends import cloister, xnnpack
from cloister.export.constants import stored as xnnpack_constants
from cloister.export.media import weight_bytes
from cloister.export.streamed import bare
from cloister.manifest import Encoder, ProgramEntry
from cloister.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from cloister.export._executorch import schema
    from cloister.export.media import Media
    from cloister.model.checkpoint import Checkpoint, Metadata
    from cloister.model.config import ModelConfig
    from cloister.model.sense import Sense
    from cloister.model.transformer import Decoder
    from cloister.progress import Progress

__all__ = ["DEFAULT_CHUNK", "STAGES", "check_kept", "constants", "longest", "program", "release",
           "stored"]

DEFAULT_CHUNK = 128  # tokens
_PLANNED_BYTES = 64 << 20
STAGES = ("pack", "trace", "convert", "plan", "write")


def release() -> str:
    """Return the release of ExecuTorch that makes programs here."""
    return version("executorch")


def longest(config: ModelConfig, chunk: int, *, both_ways: bool = False) -> int:
    """Return how many tokens one call of `forward` takes: the context, or only `chunk`.

    With `both_ways` of `text_decoder`, whose attention has a mask.

    ExecuTorch's TextLLMRunner reads a prompt in calls of `get_max_seq_len` tokens, and counts what
    it has read against the context only where that is no less (extension/llm/runner,
    text_llm_runner.cpp in 1.4: it takes a smaller one for a sliding window). But the activations of
    a call are planned, and taken, for its most tokens: beyond _PLANNED_BYTES that is too dear, and
    whoever uses that runner counts (see `cloister embed`).
    """
    shape = config.shape
    heads = shape.heads + 2 * shape.kv_heads
    a_token = 16 * (shape.hidden_size + heads * shape.head_size)  # as found on several shapes
    if both_ways or any(config.window_of(layer) for layer in range(shape.layers)):
        a_token += 8 * shape.context  # its mask
    if config.attention_softcap is not None:
        a_token += 16 * shape.heads * shape.context  # its scores
    return shape.context if a_token * shape.context <= _PLANNED_BYTES else chunk


def constants(metadata: Metadata, most: int) -> dict[str, object]:
    """Return what ExecuTorch's own C++ TextLLMRunner reads (extension/llm/runner/constants.h)."""
    shape = metadata.config.shape
    found: dict[str, object] = {
        "get_max_seq_len": most,
        "get_max_context_len": shape.context,
        "get_vocab_size": shape.vocab_size,
        "get_eos_ids": list(metadata.eos),
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    # The text runner takes its tokenizer's begin token in any case (llm_runner_helper.cpp in 1.4);
    # others read the program's, and without one begin with none.
    if metadata.bos is not None:
        found["get_bos_id"] = metadata.bos
    return found


def check_kept(metadata: Metadata, names: Sequence[str]) -> None:
    """Raise ExportError unless all backends called `names` compute with a checkpoint's matrices."""
    others = [name for name in names if name != backends.CLOISTER.name]
    if metadata.types is not None and others:
        raise ExportError(
            f"Checkpoint {metadata.name} keeps a GGUF file's own blocks, which a program for "
            f"{others[0]} cannot hold; use --backend cloister alone, or import the file without "
            "keeping its quantization and quantize that.")


def program(
    source: Checkpoint, directory: Path, *, backend: str = "xnnpack", kv: str | None = None,
    chunk: int = DEFAULT_CHUNK, progress: Progress = silent, media: Media | None = None,
) -> ProgramEntry:
    """Lower the decoder of `source`, and what `media` says, and write their program.

    `kv` says what it keeps keys and values in (`cloister.backend.KV`), or the backend does.
    `progress` is called with each of STAGES as it begins.

    Raises:
        SettingError: a backend, chunk or `kv` that is not possible.
        ExportError: the decoder is not quantized, or the context holds no picture.
    """
    metadata, chosen = source.metadata, backends.backend(backend)
    kept = chosen.kv_of(kv)
    shape = metadata.config.shape
    if not 1 <= chunk <= shape.context:
        raise SettingError(f"The chunk is {chunk}; it must be from 1 to {shape.context} tokens.")
    if metadata.recipe is None:
        raise ExportError(
            f"Checkpoint {metadata.name} is not quantized; run `cloister quantize` first."
        )
    most = longest(metadata.config, chunk)
    if media is not None:
        media.check(shape.context)
    path = directory / f"program.{chosen.name}.pte"
    if chosen is backends.CLOISTER:
        written = _cloister(source, path, {"forward": most, "score": chunk}, kept, progress, media)
    else:
        written = _xnnpack(source, path, chunk, most, progress, media)
    kv_bytes = shape.context * shape.kv_bytes_per_token(kept)
    arenas = {
        plan.name: sum(plan.non_const_buffer_sizes) for plan in written.execution_plan}
    encoders = () if media is None else tuple(
        Encoder(method=method, weight_bytes=weight_bytes(sense), arena_bytes=arenas.pop(method))
        for method, sense in media.senses.items())
    return ProgramEntry(
        file=path.name, backend=chosen.name,
        methods=chosen.methods if media is None else (*chosen.methods, *media.methods),
        operator_abi=chosen.operator_abi,
        weight_bytes=path.stat().st_size - sum(each.weight_bytes for each in encoders),
        kv_bytes=kv_bytes, arena_bytes=max(arenas.values()) - kv_bytes, encoders=encoders, kv=kept,
    )


def _xnnpack(
    source: Checkpoint, path: Path, chunk: int, most: int, progress: Progress, media: Media | None
) -> schema.Program:
    manager = xnnpack.program(
        source.load(), chunk, most, constants(source.metadata, most), progress, media)
    progress("write")
    with path.open("wb") as file:
        manager.write_to_file(file)
    return manager.executorch_program


def _cloister(
    source: Checkpoint, path: Path, mosts: Mapping[str, int], kv: backends.KV, progress: Progress,
    media: Media | None
) -> schema.Program:
    if media is not None:
        raise ExportError(
            "Programs of Cloister's own operators do not read pictures or recordings yet; use "
            "--backend xnnpack.")
    return cloister.program(
        bare(source), source.tensor, mosts, constants(source.metadata, mosts["forward"]), path, kv,
        progress)


def stored(
    backend: str, decoder: Decoder, read: Callable[[str], torch.Tensor],
    senses: Mapping[str, Sense] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a program for `backend`; see `cloister.export.constants.stored`."""
    if backend == backends.CLOISTER.name:
        return cloister.stored(decoder, read)
    return xnnpack_constants(decoder, read, senses)
