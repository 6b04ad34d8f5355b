"""`cloister kernels`: the library of Cloister's own operators."""

from __future__ import annotations

from dataclasses import dataclass

from cloister import display
from cloister.commands.options import Options, Record
from cloister.errors import KernelsUnavailable
from cloister.settings import Settings, processor

__all__ = ["Kernels", "kernels"]


@dataclass(frozen=True, kw_only=True)
class Kernels(Options):
    """What to do with the library."""

    action: str


def kernels(args: Kernels) -> Record:
    """Build the library, or say how it stands."""
    with display.quiet(args.debug):
        from cloister.runtime import program

        missing = args.action == "status" and not program.operators_built(
            Settings.from_environment())
        found = None if missing else program.own_operators()
        if isinstance(found, KernelsUnavailable):
            raise found
    record = {
        "built": found is not None, "processor": processor(),
        **({} if found is None else {
            "library": found.path.name, "packaged": found.packaged, "instruction_set": found.chosen,
            "instruction_sets": list(found.sets)}),
    }
    if not args.json:
        rows = [("processor", processor()), ("library", "not built" if found is None else (
            f"{found.path.name}, {'of the package' if found.packaged else 'built here'}"))]
        if found is not None:
            rows += [("instruction set", found.chosen), ("this processor has",
                                                         ", ".join(found.sets))]
        display.table("Cloister's own operators", ("what", "found"), rows)
    return record
