"""A copy of a program that also gives what its delegates read and give.

The wheels of ExecuTorch are built without its event tracer (executorch 1.4.1), so the program
itself is altered: its segments, where every constant and every delegate's payload lies, are copied
byte for byte, and so is its execution plan, but for two things. The arguments of the delegates
become outputs beside the logits, and get memory that nothing else uses, so that they are still
there at the end. That the copy computes what the program computes shows in the logits, which are
the same to the last bit.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.export._executorch import read_program, schema, write_program

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["instrument"]

OWN_OPERATORS = ("cloister::linear", "cloister::attention")  # those that are parts of a program
_ACTIVATIONS = 1  # number of the memory that the values of a plan lie in; 2 holds the KV buffers
_ALIGNMENT = 64  # bytes


def instrument(source: str | Path, out: str | Path, method: str = "score") -> list[list[int]]:
    """Write a copy of the program in `source` to `out`, with `method` as its only one.

    Returns, for each call of a delegate or of an operator of our own in order, the places of what
    it reads and then of what it gives among the outputs; place 0 has what the method gives.
    """
    with Path(source).open("rb") as file, Path(out).open("wb") as copy:
        program, base = read_program(file)
        (plan,) = (plan for plan in program.execution_plan if plan.name == method)
        program.execution_plan = [plan]
        calls, views = _delegate_calls(plan)
        (given,) = plan.outputs
        values = dict.fromkeys([given, *(value for call in calls for value in call)])
        _set_apart(plan, values, views)
        plan.outputs = list(values)
        size = Path(source).stat().st_size
        write_program(copy, program, size - base)
        copy.flush()
        while base < size:  # within the kernel: a fifth of the time
            base += os.sendfile(copy.fileno(), file.fileno(), base, size - base)
    places = {value: place for place, value in enumerate(plan.outputs)}
    return [[places[value] for value in call] for call in calls]


def _delegate_calls(plan: schema.ExecutionPlan) -> tuple[list[list[int]], dict[int, int]]:
    """Return what each delegate's call computes with, and the owner of the memory of each view.

    Its constants, which a program does not write, are left out. A view is made by an instruction,
    or where all sizes are known by none (executorch 1.4.1, `exir/emit/_emitter.py`): then it is
    read where nothing ever wrote it, in the memory of what was written there last.
    """
    calls, views = [], dict[int, int]()
    owners = {_place(plan, value): value for value in plan.inputs}
    known = set(plan.inputs)
    for instruction in plan.chains[0].instructions:
        arguments = instruction.instr_args
        own = isinstance(arguments, schema.KernelCall) and plan.operators[
            arguments.op_index].name in OWN_OPERATORS
        if own:
            calls.append([arguments.args[0], arguments.args[-1]])
        if isinstance(arguments, schema.DelegateCall):
            call = [value for value in arguments.args
                    if not plan.values[value].val.data_buffer_idx]
            calls.append(call)
            read, written = call[:1], call[1:]
        elif isinstance(arguments, schema.KernelCall):
            *read, last = arguments.args
            written = [last, *getattr(plan.values[last].val, "items", ())]
        else:
            continue
        for value in read:
            owner = owners.get(_place(plan, value))
            if value not in known and value not in written and owner is not None:
                views[value] = views.get(owner, owner)
            known.add(value)
        if (isinstance(arguments, schema.KernelCall)
                and plan.operators[arguments.op_index].name == "executorch_prim::et_view"):
            viewed, *_, view = arguments.args
            views[view] = views.get(viewed, viewed)
        for value in written:
            known.add(value)
            owners[_place(plan, value)] = value
    return calls, views


def _place(plan: schema.ExecutionPlan, value: int) -> tuple[int, int, int] | None:
    """Return where a tensor lies that a program writes; None for all else."""
    tensor = plan.values[value].val
    found = getattr(tensor, "allocation_info", None)
    if found is None or tensor.data_buffer_idx:
        return None
    return found.memory_id, found.memory_offset_low, found.memory_offset_high


def _set_apart(
    plan: schema.ExecutionPlan, values: Iterable[int], views: dict[int, int]
) -> None:
    """Give each of `values` memory behind all other, together with its views."""
    places: dict[int, int] = {}
    end = plan.non_const_buffer_sizes[_ACTIVATIONS]
    for value in values:
        owner = views.get(value, value)
        if owner not in places:
            places[owner] = end
            size = 4 * math.prod(plan.values[owner].val.sizes)  # float32, at its largest
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
    for number, value in enumerate(plan.values):
        place = places.get(views.get(number, number))
        if place is not None:
            value.val.allocation_info = schema.AllocationDetails(
                _ACTIVATIONS, place & 0xFFFFFFFF, place >> 32)
    plan.non_const_buffer_sizes[_ACTIVATIONS] = end
