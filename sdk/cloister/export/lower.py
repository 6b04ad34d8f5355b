"""Lowering to XNNPACK: from traced methods to a serialized ExecuTorch program."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

# Defines quantized_decomposed::embedding_byte and ::embedding_4bit.
import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
import torch
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    to_edge,
)
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import MemoryPlanningPass
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx import Graph
from torch.utils._pytree import tree_map_only

from cloister.export.graph import Delegated, trace
from cloister.export.subgraph import Subgraph
from cloister.model.config import Activation
from cloister.model.transformer import Decoder
from cloister_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from executorch.exir import ExecutorchProgramManager
    from torch.fx import Node

    from cloister.export.subgraph import Value
    from cloister.model.quantized import QuantizedEmbedding
    from cloister.model.transformer import RMSNorm

__all__ = ["xnnpack"]


class _Embedding(nn.Module):
    """Quantized embedding as ExecuTorch's own operator."""

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        self.bits = source.scheme.bits
        q = source.weight.q
        self.register_buffer("q", reference.pack_4bit_embedding(q) if self.bits == 4 else q)
        self.register_buffer("scale", source.weight.scale.float())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64[1, T] -> float32[1, T, D]."""
        ops, half = torch.ops.quantized_decomposed, 2 ** (self.bits - 1)
        lookup = ops.embedding_4bit.dtype if self.bits == 4 else ops.embedding_byte.dtype
        rows: torch.Tensor = lookup(
            self.q, self.scale, None, -half, half - 1, tokens, dtype=torch.float32
        )
        return rows


class _Delegates:
    """The delegates of one program: their payloads by name, their constants in one store."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.store = NamedDataStore()
        self.payloads: dict[str, bytes] = {}

    def __call__(
        self, name: str, size: int, build: Callable[[Subgraph, Value], list[Value]]
    ) -> Delegated:
        """Define the delegate `name` on one input of `size`, and give the module that calls it."""
        graph = Subgraph(self.rows, self.store)
        outputs = build(graph, graph.input(size))
        for value in outputs:
            graph.output(value)
        self.payloads[name] = graph.payload()
        return Delegated(name, tuple(value.size for value in outputs))


def _weight(norm: RMSNorm) -> torch.Tensor:
    return norm.weight + 1.0 if norm.offset else norm.weight


# Modules are replaced by others of the same signature, which nn.Module's typing cannot say: `Any`.
def _delegate_block(delegates: _Delegates, block: Any, twin: Any, name: str) -> None:
    """Give `twin` three delegates for what `block` computes outside attention."""
    attn, mlp = block.attn, block.mlp
    hidden = attn.qkv.q.in_features

    def normed(g: Subgraph, x: Value, norm: str) -> Value:
        module: RMSNorm = getattr(block, norm)
        return g.norm(x, f"{name}.{norm}.weight", _weight(module), module.eps)

    def qkv(g: Subgraph, x: Value) -> list[Value]:
        x = g.rounded(normed(g, x, "attn_norm"))
        return [
            g.linear(x, f"{name}.attn.qkv.{part}", getattr(attn.qkv, part)) for part in "qkv"
        ]

    def output(g: Subgraph, x: Value) -> list[Value]:
        x = g.linear(g.rounded(x), f"{name}.attn.o", attn.o)
        return [normed(g, x, "attn_post_norm") if block.post_norms else x]

    def feed_forward(g: Subgraph, x: Value) -> list[Value]:
        x = g.rounded(normed(g, x, "mlp_norm"))
        gate = g.linear(x, f"{name}.mlp.gate", mlp.gate)
        gate = g.silu(gate) if mlp.activation is Activation.SILU else g.gelu_tanh(gate)
        x = g.multiply(gate, g.linear(x, f"{name}.mlp.up", mlp.up))
        x = g.linear(g.rounded(x), f"{name}.mlp.down", mlp.down)
        return [normed(g, x, "mlp_post_norm") if block.post_norms else x]

    twin.attn.qkv = delegates(f"{name}.attn.qkv", hidden, qkv)
    twin.attn.o = delegates(f"{name}.attn.o", attn.o.in_features, output)
    twin.mlp = delegates(f"{name}.mlp", hidden, feed_forward)
    twin.attn_norm = twin.mlp_norm = nn.Identity()
    if block.post_norms:
        twin.attn_post_norm = twin.mlp_post_norm = nn.Identity()
    if block.attn.qk_norm:
        twin.attn.q_norm, twin.attn.k_norm = attn.q_norm, attn.k_norm


def _delegate(decoder: Decoder, chunk: int) -> tuple[Decoder, _Delegates]:
    """A decoder that calls delegates where `decoder` has matrices, and the delegates."""
    delegates = _Delegates(chunk)
    with torch.device("meta"):  # every parameter is replaced
        twin: Any = Decoder(decoder.config)
    for number, block in enumerate(decoder.layers):
        _delegate_block(delegates, block, twin.layers[number], f"layers.{number}")
    head: Any = decoder.head
    norm = decoder.norm

    def logits(g: Subgraph, x: Value) -> list[Value]:
        x = g.norm(x, "norm.weight", _weight(norm), norm.eps)
        return [g.linear(g.rounded(x), "head", head)]

    twin.head = delegates("head", head.in_features, logits)
    twin.norm = nn.Identity()
    embed: Any = decoder.embed
    twin.embed = _Embedding(embed)
    return twin, delegates


class _Signature:
    """What ExecuTorch asks of a lowered module's origin: its outputs for given inputs."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.graph = Graph()  # read by the emitter for debug handles and the number of outputs
        self.graph.output(sizes)

    def module(self) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        return lambda x: [x.new_empty(*x.shape[:-1], size) for size in self.sizes]


def _last_row(score: ExportedProgram) -> ExportedProgram:
    """`forward` from `score`: the same, but the head sees only the last row, [1, V] comes out."""
    module = copy.deepcopy(score.graph_module)
    graph, signature = module.graph, copy.deepcopy(score.graph_signature)
    head = next(node for node in graph.nodes if _stand_in(node) == "head")
    rows = head.args[0]
    with graph.inserting_before(head):
        last = graph.call_function(
            exir_ops.edge.aten.slice_copy.Tensor, (rows, 1, -1, torch.iinfo(torch.int64).max)
        )
    last.meta["val"] = rows.meta["val"][:, -1:]
    head.replace_input_with(rows, last)
    for node in graph.nodes:  # shapes behind the head; its stand-in gives a list
        if node >= head and node.op == "call_function":
            node.meta["val"] = tree_map_only(
                torch.Tensor, lambda x: x[:, -1:], node.meta["val"]
            )
    output = graph.output_node()
    *written, logits = output.args[0]  # the KV buffers come first
    with graph.inserting_before(output):
        row = graph.call_function(exir_ops.edge.aten.select_copy.int, (logits, 1, 0))
    row.meta["val"] = logits.meta["val"][:, 0]
    output.args = ((*written, row),)
    (spec,) = [
        spec for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT
    ]
    spec.arg = TensorArgument(name=row.name)
    module.recompile()
    return ExportedProgram(
        root=module, graph=graph, graph_signature=signature, state_dict=score.state_dict,
        range_constraints=score.range_constraints, module_call_graph=score.module_call_graph,
        constants=score.constants, verifiers=score.verifiers,
    )


def _stand_in(node: Node) -> str | None:
    """The delegate that `node` stands for, or None."""
    return str(node.args[1]) if node.target is exir_ops.edge.cloister.delegate.default else None


def _insert(program: ExportedProgram, payloads: dict[str, bytes]) -> None:
    """Put the delegate calls where the graph has their stand-ins."""
    module = program.graph_module
    graph = module.graph
    for node in list(graph.nodes):
        name = _stand_in(node)
        if name is None:
            continue
        x, _, sizes = node.args
        attribute = "delegate_" + name.replace(".", "_")
        module.add_module(attribute, LoweredBackendModule(
            _Signature(tuple(sizes)), "XnnpackBackend", payloads[name], [], None,
        ))
        with graph.inserting_before(node):
            call = graph.call_function(executorch_call_delegate, (graph.get_attr(attribute), x))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    module.recompile()


def xnnpack(
    decoder: Decoder,
    chunk: int,
    constants: dict[str, object],
    progress: Callable[[str], None] = lambda stage: None,
) -> ExecutorchProgramManager:
    """The program of a quantized `decoder`, for 1 to `chunk` tokens a call.

    `constants` become methods without arguments, as the C++ runners read them. `progress` is
    called with the name of each stage (see `cloister.export.write.STAGES`).
    """
    config = EdgeCompileConfig(_check_ir_validity=False)
    progress("pack")
    twin, delegates = _delegate(decoder, chunk)
    progress("trace")
    traced = trace(twin, chunk)
    progress("convert")
    score = to_edge({"score": traced}, compile_config=config).exported_program("score")
    progress("plan")
    methods = {"forward": _last_row(score), "score": score}
    for method in methods.values():
        _insert(method, delegates.payloads)
    edge = EdgeProgramManager(methods, constants, config)
    edge._named_data_store.merge_named_data_store(delegates.store.get_named_data_store_output())
    return edge.to_executorch(ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(
            alloc_graph_input=False, share_mutable_buffers=True
        ),
        emit_mutable_buffer_names=True,
    ))
