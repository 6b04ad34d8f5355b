"""The proof that a program holds a checkpoint's tensors, byte for byte.

A wrong entry may move what a part gives by less than rounding does, so `parts` need not see it.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloister.errors import ExportMismatch
from cloister.export._executorch import read_program
from cloister.model.quantized import QuantizedEmbedding, QuantizedLinear
from cloister.model.transformer import RMSNorm
from cloister_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from cloister.model.sense import Sense
    from cloister.model.transformer import Decoder

__all__ = ["prove_constants"]


def prove_constants(
    path: str | Path, decoder: Decoder, read: Callable[[str], torch.Tensor],
    senses: Mapping[str, Sense] | None = None,
) -> int:
    """Return the bytes of all tensors of `decoder`, which `read` gives by name, and of `senses`.

    Rotary tables are the decoder's own. Senses go by their methods; what their fronts compute with
    is no tensor of a checkpoint.

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
    for name, tensor in chain(
        ((name, _stored(decoder, name, tables[name] if name in tables else read(name)))
         for name in (*tables, *decoder.state_dict())),
        ((f"{method}.{name}", _stored(sense, name, tensor))
         for method, sense in (senses or {}).items()
         for name, tensor in sense.state_dict().items()),
    ):
        places = [delegated[name]] if name in delegated else loose
        orders = [tensor]
        if tensor.dim() > 2:  # a convolution: its channels, each by itself or all, may stand last
            orders += [tensor.movedim(1, -1), tensor.movedim(0, -1)]
        forms = [each.flatten().view(torch.uint8) for each in orders]
        stored = forms[0]
        if not any(torch.equal(data[at:at + len(form)], form) for at in places for form in forms):
            raise ExportMismatch(
                f"Tensor {name} of the checkpoint is not the program's; nothing was written, "
                "report it."
            )
        total += len(stored)
    return total


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
