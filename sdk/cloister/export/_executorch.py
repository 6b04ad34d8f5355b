"""The only file of the exporter that touches ExecuTorch, most of whose exporter is private.

The names are those of executorch 1.4.1; a newer release is tried here first.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

# Defines quantized_decomposed::embedding_byte and ::embedding_4bit.
import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
import torch
from executorch import exir
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils import xnnpack_constants
from executorch.exir import ExecutorchProgramManager, schema
from executorch.exir._serialize import _program as serialized
from executorch.exir._serialize._flatbuffer_program import (
    _flatbuffer_to_program,
    _program_to_flatbuffer,
)
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.passes import MemoryPlanningPass

# Registers llama::update_cache and llama::custom_sdpa.
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
from torchao.quantization import quant_primitives  # noqa: F401  # registers dequantize_affine

from cloister.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from torch.export import ExportedProgram

__all__ = [
    "CONSTANT_TENSOR_ALIGNMENT",
    "ExecutorchProgramManager",
    "LoweredBackendModule",
    "NamedDataStore",
    "dequantize",
    "executorch_call_delegate",
    "exir_ops",
    "partition",
    "read_program",
    "schema",
    "serialize_xnnpack_binary",
    "to_edge",
    "to_program",
    "write_program",
    "xnnpack_constants",
    "xnnpack_graph_schema",
]

_SEGMENT_ALIGNMENT = 4096  # bytes; a multiple of the 128 that ExecuTorch itself writes by
_CONFIG = exir.EdgeCompileConfig(_check_ir_validity=False)

dequantize = torch.ops.torchao.dequantize_affine


def to_edge(methods: Mapping[str, ExportedProgram]) -> exir.EdgeProgramManager:
    """Convert the methods to ExecuTorch's edge dialect."""
    return exir.to_edge(dict(methods), compile_config=_CONFIG)


def to_program(
    methods: Mapping[str, ExportedProgram], constants: Mapping[str, object], store: NamedDataStore
) -> ExecutorchProgramManager:
    """Build the program of edge `methods`, which share mutable buffers under their own names."""
    edge = exir.EdgeProgramManager(dict(methods), dict(constants), _CONFIG)
    edge._named_data_store.merge_named_data_store(store.get_named_data_store_output())
    return edge.to_executorch(exir.ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(
            alloc_graph_input=False, share_mutable_buffers=True
        ),
        emit_mutable_buffer_names=True,
    ))


def partition(
    traced: ExportedProgram, backend: str, constants: Mapping[str, object]
) -> ExecutorchProgramManager:
    """Build the program whose delegates have what the partitioner of `backend` takes of `traced`.

    Raises:
        ExportError: the backend's exporter is not installed.
    """
    with _hushed(), torch.no_grad():
        edge = exir.to_edge_transform_and_lower(
            traced, partitioner=[_PARTITIONERS[backend]()], constant_methods=dict(constants),
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True))
        return edge.to_executorch()


def _coreml() -> Any:  # untyped, like all of ExecuTorch
    try:
        import coremltools
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    except ImportError as error:
        raise ExportError(
            "A Core ML program is made by the package coremltools, which cannot be imported here; "
            "install it (`pip install coremltools==9.0`) or leave out --also coreml.") from error
    return CoreMLPartitioner(compile_specs=CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18))  # the first with state and int4 groups


def _vulkan() -> Any:  # untyped, like all of ExecuTorch
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return VulkanPartitioner()


_PARTITIONERS = {"coreml": _coreml, "vulkan": _vulkan}


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what the partitioners log to themselves, and Python's root logger as it was."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    level, handlers = root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)  # vulkan_partitioner.py of 1.4.1 sets it when it is imported
        root.handlers[:] = handlers


def read_program(file: BinaryIO) -> tuple[schema.Program, int]:
    """Read the program in `file` without its segments; return it and where these begin."""
    header = serialized._get_extended_header(file.read(serialized._ExtendedHeader.NUM_HEAD_BYTES))
    assert header is not None
    file.seek(0)
    return _flatbuffer_to_program(file.read(header.program_size)), header.segment_base_offset


def write_program(file: BinaryIO, program: schema.Program, segments_bytes: int) -> None:
    """Write `program` into `file` up to where its segments begin; they come next, unchanged."""
    flat = _program_to_flatbuffer(program)
    header_size = serialized.aligned_size(
        serialized._ExtendedHeader.EXPECTED_LENGTH, flat.max_alignment)
    size = header_size + len(flat.data)
    base = serialized.aligned_size(size, _SEGMENT_ALIGNMENT)
    header = serialized._ExtendedHeader(size, base, segments_bytes).to_bytes()
    file.write(serialized._insert_flatbuffer_header(
        flat.data, "ET..", serialized.pad_to(header, header_size)).ljust(base, b"\0"))
