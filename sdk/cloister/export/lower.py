"""From a traced decoder to an ExecuTorch program, for backends that fill in delegates.

A backend gives the payload of each delegate by name; its constants lie in one store.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx import Graph
from torch.utils._pytree import tree_map_only

from cloister.export import _executorch
from cloister.export._executorch import LoweredBackendModule, executorch_call_delegate, exir_ops

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Node

    from cloister.export._executorch import ExecutorchProgramManager, NamedDataStore
    from cloister.progress import Progress

__all__ = ["lower"]


_LAST_ROW = ("forward", "text_decoder")  # methods that give the last row of what is traced


def lower(
    traced: Mapping[str, ExportedProgram], registered: str,
    payloads: Mapping[str, bytes], store: NamedDataStore, constants: Mapping[str, object],
    progress: Progress,
) -> ExecutorchProgramManager:
    """Return a program of `traced`, its methods by name.

    Of `forward` and `text_decoder` the last row alone. That `forward` and `score` are traced as one
    saves half of the time.

    `registered` is the backend's name in ExecuTorch's registry. `constants` become methods
    without arguments, as the C++ runners read them.
    """
    progress("convert")
    distinct = {id(method): name for name, method in traced.items()}
    edge = _executorch.to_edge({
        name: method for name, method in traced.items() if distinct[id(method)] == name})
    progress("plan")
    methods = {}
    for name, method in traced.items():
        found = edge.exported_program(distinct[id(method)])
        methods[name] = _last_row(found) if name in _LAST_ROW else found
    for method in methods.values():
        _insert(method, registered, payloads)
    return _executorch.to_program(methods, constants, store)


class _Signature:
    """The origin of a lowered module, of which ExecuTorch asks the outputs for given inputs."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.graph = Graph()  # read by the emitter for debug handles and the number of outputs
        self.graph.output(sizes)

    def module(self) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        return lambda x, *_: [x.new_empty(*x.shape[:-1], size) for size in self.sizes]


def _last_row(score: ExportedProgram) -> ExportedProgram:
    """Derive `forward` from `score`: the head sees only the last row, [1, V] comes out."""
    module = copy.deepcopy(score.graph_module)
    graph, signature = module.graph, copy.deepcopy(score.graph_signature)
    head = next(node for node in graph.nodes if _delegate_name(node) == "head")
    rows = head.args[0]
    with graph.inserting_before(head):
        last = graph.call_function(
            exir_ops.edge.aten.slice_copy.Tensor, (rows, 1, -1, torch.iinfo(torch.int64).max)
        )
    last.meta["val"] = rows.meta["val"][:, -1:]
    head.replace_input_with(rows, last)
    for node in graph.nodes:  # shapes behind the head; its mark gives a list
        if node >= head and node.op == "call_function":
            node.meta["val"] = tree_map_only(torch.Tensor, lambda x: x[:, -1:], node.meta["val"])
    output = graph.output_node()
    *written, logits = output.args[0]  # the KV buffers come first
    with graph.inserting_before(output):
        row = graph.call_function(exir_ops.edge.aten.select_copy.int, (logits, 1, 0))
    row.meta["val"] = logits.meta["val"][:, 0]
    output.args = ((*written, row),)
    (spec,) = [spec for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    spec.arg = TensorArgument(name=row.name)
    module.recompile()
    return ExportedProgram(
        root=module, graph=graph, graph_signature=signature, state_dict=score.state_dict,
        range_constraints=score.range_constraints, module_call_graph=score.module_call_graph,
        constants=score.constants, verifiers=score.verifiers,
    )


def _delegate_name(node: Node) -> str | None:
    """Return the name of the delegate that `node` marks, or None."""
    return str(node.args[1]) if node.target is exir_ops.edge.cloister.delegate.default else None


def _insert(program: ExportedProgram, registered: str, payloads: Mapping[str, bytes]) -> None:
    """Replace the marks in the graph by calls of their delegates."""
    module = program.graph_module
    graph = module.graph
    for node in list(graph.nodes):
        name = _delegate_name(node)
        if name is None:
            continue
        x, _, sizes, constants = node.args
        attribute = "delegate_" + name.replace(".", "_")
        module.add_module(attribute, LoweredBackendModule(
            _Signature(tuple(sizes)), registered, payloads[name], [], None,
        ))
        with graph.inserting_before(node):
            call = graph.call_function(
                executorch_call_delegate, (graph.get_attr(attribute), x, *constants))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    module.recompile()
