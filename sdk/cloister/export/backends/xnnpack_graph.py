"""The payload of one XNNPACK delegate call, built directly.

ExecuTorch's own partitioner re-runs its passes over every partition of every method: about
500 of the 590 seconds that a 1.8 B model takes (executorch 1.4.1,
`exir/backend/backend_api.py`, `backends/xnnpack/_passes/__init__.py`). What a decoder needs of
XNNPACK is small and known beforehand, so it is written down here as the same records that the
partitioner would end with (`backends/xnnpack/serialization/xnnpack_graph_schema.py`).

Every value is float32[1, T, N] with T dynamic, unless it is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cloister.export._executorch import (
    CONSTANT_TENSOR_ALIGNMENT,
    NamedDataStore,
    serialize_xnnpack_binary,
)
from cloister.export._executorch import xnnpack_constants as xnn
from cloister.export._executorch import xnnpack_graph_schema as schema
from cloister.export.graph import Delegated
from cloister_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.quantized import QuantizedLinear

__all__ = ["Delegates", "Subgraph", "Value"]


@dataclass(frozen=True)
class Value:
    """A tensor in the graph: its number, and the size of its last dimension."""

    id: int
    size: int


@dataclass
class Subgraph:
    """One delegate: inputs, then operators, then outputs, then `payload`.

    `rows` is the largest T. Constants go into `store` under `prefix` and their own name, once for
    all methods of the program.
    """

    rows: int
    store: NamedDataStore
    leading: tuple[int, ...] = (1,)  # dimensions before T, where there are more
    _values: list[schema.XValue] = field(default_factory=list)
    _nodes: list[schema.XNode] = field(default_factory=list)
    _constants: list[schema.ConstantDataOffset] = field(
        default_factory=lambda: [schema.ConstantDataOffset(0, 0)]
    )
    arguments: list[torch.Tensor] = field(default_factory=list)
    """Constants that each call is given behind its input, in order."""
    _arguments: dict[str, Value] = field(default_factory=dict)
    _inputs: list[int] = field(default_factory=list)
    _outputs: list[int] = field(default_factory=list)

    def input(self, size: int) -> Value:
        """Add the next argument of the delegate, float32[1, T, size]."""
        flag, external = xnn.XNN_VALUE_FLAG_EXTERNAL_INPUT, len(self._inputs)
        value = self._value([*self.leading, self.rows, size], flags=flag, external=external)
        self._inputs.append(value.id)
        return value

    def output(self, value: Value) -> None:
        """Return `value`; call once for each result, after the last operator."""
        record = self._values[value.id].xvalue_union
        record.external_id = len(self._inputs) + len(self._outputs)
        record.flags |= xnn.XNN_VALUE_FLAG_EXTERNAL_OUTPUT
        self._outputs.append(value.id)

    def linear(self, x: Value, name: str, layer: QuantizedLinear) -> Value:
        """Multiply 8-bit dynamic activations, from `rounded`, by integer weights."""
        weight, scheme = layer.weight, layer.scheme
        grouped = scheme.group is not None
        packed = self._constant(
            f"{name}.weight.q",
            (lambda: reference.pack_4bit(weight.q)) if grouped else (lambda: weight.q),
            layer.out_features * layer.in_features * scheme.bits // 8,
        )
        scales = self._constant(
            f"{name}.weight.scale", lambda: weight.scale,
            weight.scale.numel() * scheme.scale_bits // 8,
        )
        scaling: dict[str, Any] = {
            "scale": [], "channel_dim": 0, "scale_buffer_idx": scales,
            "num_scales": weight.scale.numel(),
        }
        filter_ = self._value(
            [layer.out_features, layer.in_features], buffer=packed,
            kind=schema.XNNDatatype.xnn_datatype_qbint4 if grouped
            else schema.XNNDatatype.xnn_datatype_qcint8,
            quantization=schema.PerChannelGroupQuant(**scaling, group_size=scheme.group)
            if grouped else schema.PerChannelQuant(**scaling),
        )
        bias = None if layer.bias is None else self.constant(f"{name}.bias", layer.bias)
        return self._fully_connected(x, filter_, layer.out_features, bias)

    def rounded(self, x: Value) -> Value:
        """Round `x` to 8 bits with a scale and zero point for each row, as `linear` takes it."""
        out = self._value(
            [*self.leading, self.rows, x.size], kind=schema.XNNDatatype.xnn_datatype_qdint8,
            quantization=schema.PerTokenDynamicQuant(num_nonbatch_dims=1),
        )
        self._node(schema.XNNConvert(input_id=x.id, output_id=out.id, flags=0))
        return out

    def norm(self, x: Value, name: str, weight: torch.Tensor, eps: float) -> Value:
        """Normalize by the root mean square of the last dimension, times `weight`."""
        squares = self.multiply(x, x)
        # XNNPACK's schema has no mean over the last dimension: a linear layer with one output.
        averager = self.constant(f"mean.{x.size}", torch.full((1, x.size), 1.0 / x.size))
        shift = self.constant(f"shift.{eps!r}", torch.tensor([eps]))
        mean = self._fully_connected(squares, averager, 1, shift)
        inverse = self._emit(1, lambda out: schema.XNNReciprocalSquareRoot(mean.id, out, 0))
        return self.multiply(self.multiply(x, inverse), self.argument(name, weight))

    def layer_norm(
        self, x: Value, name: str, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> Value:
        """Subtract the mean of the last dimension, divide by the deviation, times `weight` and on.
        """
        taker = self.constant(f"negative_mean.{x.size}", torch.full((1, x.size), -1.0 / x.size))
        centred = self.add(x, self._fully_connected(x, taker, 1))
        averager = self.constant(f"mean.{x.size}", torch.full((1, x.size), 1.0 / x.size))
        shift = self.constant(f"shift.{eps!r}", torch.tensor([eps]))
        variance = self._fully_connected(self.multiply(centred, centred), averager, 1, shift)
        inverse = self._emit(1, lambda out: schema.XNNReciprocalSquareRoot(variance.id, out, 0))
        scaled = self.multiply(self.multiply(centred, inverse), self.argument(name, weight))
        return self.add(scaled, self.argument(f"{name}.bias", bias))

    def dense(
        self, x: Value, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> Value:
        """Multiply by a float32 matrix [N, K]."""
        shift = None if bias is None else self.constant(f"{name}.bias", bias)
        return self._fully_connected(
            x, self.constant(f"{name}.weight", weight), weight.shape[0], shift)

    def depthwise(
        self, x: Value, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> Value:
        """Convolve each feature over T, which stays as long, by [N, 1, odd number].

        T stands behind two dimensions, as rows and columns of a picture do.
        """
        size, _, span = weight.shape
        filter_ = self.constant(f"{name}.weight", weight.permute(1, 2, 0).unsqueeze(0))
        shift = self.constant(
            f"{name}.bias", torch.zeros(size) if bias is None else bias)
        return self._emit(size, lambda out: schema.XNNDepthwiseConv2d(
            padding_top=0, padding_bottom=0, padding_left=span // 2, padding_right=span // 2,
            kernel_height=1, kernel_width=span, subsampling_height=1, subsampling_width=1,
            dilation_height=1, dilation_width=1, group_input_channels=1, group_output_channels=1,
            groups=size, adjustment_height=0, adjustment_width=0, input1_id=x.id,
            filter_id=filter_.id, bias_id=shift.id, output_id=out, flags=0))

    def gelu(self, x: Value) -> Value:
        """Return x / 2 (1 + erf(x / sqrt(2)))."""
        return self._emit(x.size, lambda out: schema.XNNGelu(x.id, out, 0))

    def silu(self, x: Value) -> Value:
        """Return x * sigmoid(x)."""
        gate = self._emit(x.size, lambda out: schema.XNNSigmoid(x.id, out, 0))
        return self.multiply(x, gate)

    def gelu_tanh(self, x: Value) -> Value:
        """Return x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x * sigmoid(2 ...)."""
        # 0.5 (1 + tanh(y)) = sigmoid(2 y), one operator fewer.
        root = 2 * (2 / torch.pi) ** 0.5
        square = self.multiply(x, x)
        inner = self.add(self.multiply(square, self.scalar(0.044715 * root)), self.scalar(root))
        argument = self.multiply(x, inner)
        gate = self._emit(x.size, lambda out: schema.XNNSigmoid(argument.id, out, 0))
        return self.multiply(x, gate)

    def multiply(self, a: Value, b: Value) -> Value:
        """Multiply elementwise, with broadcasting."""
        return self._emit(max(a.size, b.size), lambda out: schema.XNNMultiply(a.id, b.id, out, 0))

    def add(self, a: Value, b: Value) -> Value:
        """Add elementwise, with broadcasting."""
        return self._emit(max(a.size, b.size), lambda out: schema.XNNAdd(a.id, b.id, out, 0))

    def scalar(self, number: float) -> Value:
        """Return a constant of one element."""
        return self.argument(f"scalar.{number!r}", torch.tensor([number]))

    def argument(self, name: str, tensor: torch.Tensor) -> Value:
        """Return a float32 constant that an operator reads in place, at each call.

        XNNPACK's weights cache, which builds for phones have on, frees all constants of a delegate
        once they are packed, those that are never packed too (executorch 1.4.1,
        `XNNWeightsCache::finalize_for_runtime`): the caller holds these.
        """
        if name not in self._arguments:
            wide = tensor.detach().float().contiguous()
            value = self._value(list(wide.shape), flags=xnn.XNN_VALUE_FLAG_EXTERNAL_INPUT,
                                external=len(self._inputs))
            self._inputs.append(value.id)
            self.arguments.append(wide)
            self._arguments[name] = value
        return self._arguments[name]

    def constant(self, name: str, tensor: torch.Tensor) -> Value:
        """Return a float32 constant that an operator packs."""
        wide = tensor.detach().float().contiguous()
        buffer = self._constant(name, lambda: wide, wide.numel() * 4)
        return self._value(list(wide.shape), buffer=buffer)

    def payload(self) -> bytes:
        """Serialize the delegate without its constants."""
        graph = schema.XNNGraph(
            version="0", xnodes=self._nodes, xvalues=self._values,
            num_externs=len(self._inputs) + len(self._outputs),
            input_ids=self._inputs, output_ids=self._outputs, constant_data=self._constants,
        )
        payload: bytes = serialize_xnnpack_binary(graph, bytearray())
        return payload

    def _constant(self, name: str, make: Callable[[], torch.Tensor], size_bytes: int) -> int:
        if name not in self.store.pte_data:
            tensor = make().contiguous()
            self.store.add_named_data(
                name, tensor.view(torch.uint8).numpy().tobytes(), CONSTANT_TENSOR_ALIGNMENT
            )
        self._constants.append(
            schema.ConstantDataOffset(offset=xnn.UINT64_MAX, size=size_bytes, named_key=name)
        )
        return len(self._constants) - 1

    def _fully_connected(
        self, x: Value, filter_: Value, size: int, bias: Value | None = None
    ) -> Value:
        bias_id = xnn.XNN_INVALID_VALUE_ID if bias is None else bias.id
        return self._emit(size, lambda out: schema.XNNFullyConnected(
            input1_id=x.id, filter_id=filter_.id, bias_id=bias_id, output_id=out, flags=0))

    def _emit(self, size: int, make: Callable[[int], schema.XNodeUnion]) -> Value:
        out = self._value([*self.leading, self.rows, size])
        self._node(make(out.id))
        return out

    def _node(self, record: schema.XNodeUnion) -> None:
        self._nodes.append(schema.XNode(xnode_union=record, debug_handle=len(self._nodes)))

    def _value(
        self, dims: list[int], *, flags: int = 0, external: int = xnn.XNN_INVALID_VALUE_ID,
        buffer: int = 0, kind: schema.XNNDatatype = schema.XNNDatatype.xnn_datatype_fp32,
        quantization: schema.XNNQuantParams | None = None,
    ) -> Value:
        number = len(self._values)
        record = schema.XNNTensorValue(
            datatype=kind, num_dims=len(dims), dims=dims, constant_buffer_idx=buffer,
            external_id=external, flags=flags, id_out=number,
        )
        if quantization is not None:
            record = schema.XNNQuantizedTensorValue(record, quantization)
        self._values.append(schema.XValue(record))
        return Value(number, dims[-1])


class Delegates:
    """The delegates of one program: their payloads by name, their constants in one store."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.store = NamedDataStore()
        self.payloads: dict[str, bytes] = {}

    def __call__(
        self, name: str, size: int, build: Callable[[Subgraph, Value], list[Value]],
        rows: int | None = None, leading: tuple[int, ...] = (1,),
    ) -> Delegated:
        """Define the delegate `name` on one input of `size`; return the module that calls it.

        Of other than the decoder's, `rows` is the largest T, behind dimensions `leading`.
        """
        graph = Subgraph(self.rows if rows is None else rows, self.store, leading)
        outputs = build(graph, graph.input(size))
        for value in outputs:
            graph.output(value)
        self.payloads[name] = graph.payload()
        return Delegated(name, tuple(value.size for value in outputs), graph.arguments)
