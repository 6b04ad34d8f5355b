"""llama.cpp's part: see `__main__.py`, and for `peer.py` of the benchmarks two commands more.

    PYTHON FOLDER llamacpp quantize FROM TO TYPE THREADS
    PYTHON FOLDER llamacpp logits MODEL TEXTS OUT THREADS

`logits` writes `OUT/0.npy`, ...: float32[T, V] of each text in the JSON file TEXTS, lists of ids.
Keys and values are kept in float32, so that what is lost is lost by the weights and activations of
matrix products. Speed is that of llama.cpp's own defaults (float16 keys and values, flash attention
where it chooses that).
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as library
import numpy as np

_F32, _PLAIN = 0, 0  # of enum ggml_type; of enum llama_flash_attn_type
_ERROR = 4  # of enum ggml_log_level


@library.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: object) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def about() -> dict[str, Any]:
    """Return which of the processor's instructions this build makes use of."""
    has = library.llama_print_system_info().decode().removeprefix("CPU : ").split(" | ")
    return {"system": " ".join(each.removesuffix(" = 1") for each in has if each.endswith(" = 1"))}


def quantize(source: str, out: str, kind: str, threads: str) -> dict[str, Any]:
    """Quantize without an importance matrix, as llama.cpp's own command does."""
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = int(threads)
    begun = time.perf_counter()
    if library.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)):
        sys.exit(f"llama.cpp cannot make {kind} of {source}.")
    return {"seconds": time.perf_counter() - begun}


def logits(path: str, texts: str, out: str, threads: str) -> dict[str, Any]:
    """Write the logits after every token of each text, which is read from an empty context."""
    rows = json.loads(Path(texts).read_text("utf-8"))
    model = Model(path, max(map(len, rows)), int(threads), exact=True)
    for number, ids in enumerate(rows):
        model.clear()
        np.save(Path(out) / f"{number}.npy", model.logits(ids))
    return {"texts": len(rows)}


class Model:
    """See `__main__.Model`; `exact` keeps keys and values in float32."""

    def __init__(self, path: str, context: int, threads: int, *, exact: bool = False) -> None:
        model = library.llama_model_load_from_file(
            path.encode(), library.llama_model_default_params())
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = _F32
            settings.flash_attn_type = _PLAIN
        self._context = library.llama_init_from_model(model, settings) if model else None
        if not self._context:
            sys.exit(f"llama.cpp cannot open {path}.")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def clear(self) -> None:
        """Forget what was read."""
        library.llama_memory_clear(library.llama_get_memory(self._context), True)

    def read(self, count: int) -> None:
        """Read more tokens at once, and give the logits after the last."""
        ids = (library.llama_token * count)(*[1] * count)
        self._decode(library.llama_batch_get_one(ids, count))

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Read a text, float32[T, V]: a view until the next."""
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        self._decode(batch)
        library.llama_batch_free(batch)
        return np.ctypeslib.as_array(
            library.llama_get_logits(self._context), (len(ids), self._vocabulary))

    def _decode(self, batch: Any) -> None:
        if library.llama_decode(self._context, batch):
            sys.exit("llama.cpp cannot decode.")
        library.llama_synchronize(self._context)


library.llama_log_set(_log, None)  # hundreds of lines a model
