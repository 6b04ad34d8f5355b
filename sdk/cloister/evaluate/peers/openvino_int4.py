"""OpenVINO's part: see `__main__.py`. Weights of 4 bits, symmetric, in groups of 32.

The model is the stateful one that optimum-intel exports; as in OpenVINO GenAI, logits are computed
for the last token alone. Everything else is the plugin's default, its 8-bit KV cache included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13


def convert(source: str, out: str) -> None:
    """Write the model of a folder of transformers'."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False,
        quantization_config=OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0),
    ).save_pretrained(out)


class Model:
    """See `__main__.Model`."""

    def __init__(self, path: str, context: int, threads: int) -> None:  # noqa: ARG002
        core = openvino.Core()
        model = core.read_model(Path(path, "openvino_model.xml"))
        _last_row_alone(model)
        self._names = {name for each in model.inputs for name in each.names}
        self._request = core.compile_model(model, "CPU", {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        ).create_infer_request()
        self._read = 0

    def clear(self) -> None:
        """Forget what was read."""
        self._request.reset_state()
        self._read = 0

    def read(self, count: int) -> None:
        """Read more tokens at once, and give the logits after the last."""
        end = self._read + count
        inputs: dict[str, Any] = {
            "input_ids": np.ones((1, count), np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._read, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: inputs[name] for name in self._names & set(inputs)})
        self._read = end


def _last_row_alone(model: Any) -> None:
    """Put a slice before the head's matrix product."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input(0)
    first, stop, step, axis = (opset13.constant([number]) for number in (-1, 2**31 - 1, 1, 1))
    rows.replace_source_output(
        opset13.slice(rows.get_source_output(), first, stop, step, axis).output(0))
    model.validate_nodes_and_infer_types()
