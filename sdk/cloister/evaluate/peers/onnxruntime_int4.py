"""ONNX Runtime GenAI's part: see `__main__.py`. Weights of 4 bits, symmetric, in groups of 32."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime_genai as library


def convert(source: str, out: str) -> None:
    """Write the model of a folder of transformers', as the package's own command does."""
    command = ["builder", "-m", "random", "-i", source, "-o", out, "-p", "int4", "-e", "cpu",
               "-c", str(Path(out, "cache")), "--extra_options", "block_size=32",
               "is_symmetric=true"]
    with patch.object(sys, "argv", command):
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


class Model:
    """See `__main__.Model`."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        config = library.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {
            "intra_op_num_threads": threads}}}}))
        self._model = library.Model(config)
        self._settings = library.GeneratorParams(self._model)
        self._settings.set_search_options(max_length=context, do_sample=False)
        self.clear()

    def clear(self) -> None:
        """Forget what was read."""
        self._generator = library.Generator(self._model, self._settings)

    def read(self, count: int) -> None:
        """Read more tokens at once, and give the logits after the last."""
        self._generator.append_tokens(np.ones(count, np.int32))
