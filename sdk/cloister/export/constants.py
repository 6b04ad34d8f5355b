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
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn

    from cloister.model.sense import Sense
    from cloister.model.transformer import Decoder

__all__ = ["prove_constants", "stored"]

_BEGINNING = 4096  # bytes


def stored(
    decoder: Decoder, read: Callable[[str], torch.Tensor],
    senses: Mapping[str, Sense] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of `decoder`, which `read` gives by name, and of `senses`, by their names.

    As a program for XNNPACK holds them. Rotary tables are the decoder's own. Senses go by their
    methods; what their fronts compute with is no tensor of a checkpoint.
    """
    tables = {name: table for name, table in decoder.named_buffers() if "." not in name}
    for name in (*tables, *decoder.state_dict()):
        yield name, _stored(decoder, name, tables[name] if name in tables else read(name))
    for method, sense in (senses or {}).items():
        for name, tensor in sense.state_dict().items():
            yield f"{method}.{name}", _stored(sense, name, tensor)


def prove_constants(path: str | Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Return the bytes of `tensors`, which go by their names, if the program in `path` has them.

    Raises:
        ExportMismatch: a tensor is not in the program.
    """
    with Path(path).open("rb") as file:
        program, base = read_program(file)
    size = Path(path).stat().st_size
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # mapped
    starts = [base + segment.offset for segment in program.segments]
    delegated = {each.key: starts[each.segment_index] for each in program.named_data or ()}
    others = program.constant_segment
    loose = [starts[others.segment_index] + offset for offset in others.offsets]
    total = 0
    for name, tensor in tensors:
        places = [delegated[name]] if name in delegated else loose
        orders = [tensor]
        if tensor.dim() > 2:  # a convolution: its channels, each by itself or all, may stand last
            orders += [tensor.movedim(1, -1), tensor.movedim(0, -1)]
        forms = [each.flatten().view(torch.uint8) for each in orders]
        stored = forms[0]
        if not any(_equal(data[at:at + len(form)], form) for at in places for form in forms):
            raise ExportMismatch(
                f"Tensor {name} of the checkpoint is not the program's; nothing was written, "
                "report it."
            )
        total += len(stored)
    return total


def _equal(data: torch.Tensor, form: torch.Tensor) -> bool:
    begun = len(form[:_BEGINNING])  # most places differ there
    return torch.equal(data[:begun], form[:begun]) and torch.equal(data, form)


def _stored(part: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a program holds it."""
    owner, _, attribute = name.rpartition(".")
    matrix = part.get_submodule(owner.removesuffix(".weight"))
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
    return tensor
