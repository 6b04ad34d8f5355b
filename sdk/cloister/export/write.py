"""From a quantized decoder to the files of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from cloister.errors import ExportError, SettingError
from cloister.export import lower

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cloister.model.checkpoint import Metadata
    from cloister.model.transformer import Decoder

__all__ = ["BACKENDS", "DEFAULT_CHUNK", "STAGES", "Planned", "program"]

BACKENDS = {"xnnpack": lower.xnnpack}
DEFAULT_CHUNK = 128  # tokens
STAGES = ("pack", "trace", "convert", "plan", "write")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a written program takes when it runs."""

    executorch: str  # release that made it
    size_bytes: int
    kv_bytes: int
    arena_bytes: int  # activations of the method that needs most


def program(
    decoder: Decoder,
    metadata: Metadata,
    path: Path,
    *,
    backend: str = "xnnpack",
    chunk: int = DEFAULT_CHUNK,
    progress: Callable[[str], None] = lambda stage: None,
) -> Planned:
    """Lower `decoder` and write the program to `path`; `progress` is called with each of STAGES.

    Raises:
        SettingError: a backend or chunk that is not possible.
        ExportError: the decoder is not quantized.
    """
    shape = decoder.config.shape
    if backend not in BACKENDS:
        raise SettingError(
            f"No backend is named {backend!r}; choose one of {', '.join(BACKENDS)}."
        )
    if not 1 <= chunk <= shape.context:
        raise SettingError(f"The chunk is {chunk}; it must be from 1 to {shape.context} tokens.")
    if metadata.recipe is None:
        raise ExportError(
            f"Checkpoint {metadata.name} is not quantized; run `cloister quantize` first."
        )
    # What ExecuTorch's own C++ TextLLMRunner reads (extension/llm/runner/constants.h).
    constants: dict[str, object] = {
        "get_max_seq_len": chunk,
        "get_max_context_len": shape.context,
        "get_vocab_size": shape.vocab_size,
        "get_bos_id": metadata.bos if metadata.bos is not None else next(iter(metadata.eos), 0),
        "get_eos_ids": list(metadata.eos),
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    manager = BACKENDS[backend](decoder, chunk, constants, progress)
    progress("write")
    with path.open("wb") as file:
        manager.write_to_file(file)
    plans = manager.executorch_program.execution_plan
    kv_bytes = shape.context * shape.kv_bytes_per_token()
    arenas = [sum(plan.non_const_buffer_sizes) for plan in plans]
    return Planned(
        executorch=version("executorch"),
        size_bytes=path.stat().st_size,
        kv_bytes=kv_bytes,
        arena_bytes=max(arenas) - kv_bytes,
    )
