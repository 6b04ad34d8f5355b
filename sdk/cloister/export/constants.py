"""The proof that a program holds a checkpoint's tensors, byte for byte.

A wrong entry may move what a part gives by less than rounding does, so `parts` need not see it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloister.errors import ExportMismatch
from cloister.export._executorch import read_program
from cloister.model.quantized import QuantizedEmbedding, QuantizedLinear
from cloister.model.transformer import RMSNorm
from cloister_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.model.transformer import Decoder

__all__ = ["prove_constants"]


def prove_constants(
    path: str | Path, decoder: Decoder, read: Callable[[str], torch.Tensor]
) -> int:
    """Return the bytes of all tensors of `decoder`, which `read` gives by name.

    Rotary tables are the decoder's own.

    Raises:
        ExportMismatch: a tensor is not in the program in `path`.
    """
    with Path(path).open("rb") as file:
        program, base = read_program(file)
    size = Path(path).stat().st_size
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # mapped
    starts = [base + segment.offset for segment in program.segments]
    delegated = {each.key: starts[each.segment_index] for each in program.named_data}
    others = program.constant_segment
    loose = [starts[others.segment_index] + offset for offset in others.offsets]
    tables = {name: table for name, table in decoder.named_buffers() if "." not in name}
    total = 0
    for name in (*tables, *decoder.state_dict()):
        tensor = tables[name] if name in tables else read(name)
        stored = _stored(decoder, name, tensor)
        places = [delegated[name]] if name in delegated else loose
        if not any(torch.equal(data[at:at + len(stored)], stored) for at in places):
            raise ExportMismatch(
                f"Tensor {name} of the checkpoint is not the program's; nothing was written, "
                "report it."
            )
        total += len(stored)
    return total


def _stored(decoder: Decoder, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes that a program holds for a tensor, uint8[n]."""
    owner, _, attribute = name.rpartition(".")
    matrix = decoder.get_submodule(owner.removesuffix(".weight"))
    if isinstance(matrix, QuantizedEmbedding):
        if attribute == "scale":
            tensor = tensor.float()
        elif matrix.scheme.bits == 4:
            tensor = reference.pack_4bit_embedding(tensor)
    elif isinstance(matrix, QuantizedLinear):
        if attribute == "q" and matrix.scheme.bits == 4:
            tensor = reference.pack_4bit(tensor)
    else:
        tensor = tensor.float()
        # Of the norms those of queries and keys are the graph's; to the delegates' it is added.
        if isinstance(matrix, RMSNorm) and matrix.offset and (
                not owner.endswith(("q_norm", "k_norm"))):
            tensor = tensor + 1.0
    return tensor.contiguous().view(torch.uint8).flatten()
