"""Programs of Cloister's own operators, altered one by one, loaded and run.

    python tests/campaigns/programs.py [--bundle BUNDLE] [--count 200] [--seed N] [--only KIND]

Each is loaded without a look at its bundle's checksums, and reads a golden prompt, in a process of
its own. It must give an answer, or be refused by name. A process that ends is counted apart: by
ExecuTorch, as it loads the program or by its own checks, or else within a call, which is a fault.
(Those who start it see a named error then, too: the worker's end.) Faults are printed with their
numbers, by which `Altered` makes them again, and the exit code is 1. A run of all kinds writes its
table into `programs.md` beside this file. `tests/unit/export/test_altered_programs.py` runs a few
of each. Without BUNDLE the smallest shipped model is exported.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cloister import pipeline, reference
from cloister.bundle import Bundle, Golden
from cloister.errors import CloisterError
from cloister.export import _executorch as exporter
from cloister.model.checkpoint import Checkpoint
from cloister.model.recipe import Recipe
from cloister.quantize.apply import quantize
from cloister.runtime import _executorch as runtime
from cloister.runtime.program import own_operators
from cloister.settings import processor

HERE = Path(__file__)
NUMBERS = (0, 1, -1, 2, 3, 6, 7, 16, 31, 33, 64, 4096, 2**31 - 1, 2**31, 2**32 + 1, 2**62, -2**62)
OUTCOMES = ("same answer", "another answer", "refused by name", "ended by ExecuTorch", "fault")
TIME_S = 60
LOADED = "the program is loaded"
# Its own checks; and 1.4.1 calls an operator that it found to be none where a later one is known
# (`delayed_error` of runtime/executor/method.cpp).
ITS_OWN = r"In function .*assert failed|Op index \d+ out of range"


def exported(folder: Path) -> Bundle:
    quantize(Checkpoint.open(reference.checkpoint_path("nano-1")), folder / "quantized",
             Recipe.parse("8da4w-g32"))
    return pipeline.export(
        Checkpoint.open(folder / "quantized"), folder / "own.cloister", backends=("cloister",))


class Altered:
    """Makes programs that differ from the one in `path`."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.program, self.base = exporter.read_program(file)
        self.data = path.read_bytes()

    def calls(self, plan: Any) -> list[Any]:
        """Return the calls of Cloister's own operators."""
        own = [i for i, each in enumerate(plan.operators) if each.name.startswith("cloister::")]
        return [step.instr_args for chain in plan.chains for step in chain.instructions
                if getattr(step.instr_args, "op_index", None) in own]

    def number(self, program: Any, rng: random.Random) -> None:
        """Change a number that an operator is given."""
        plan = program.execution_plan[0]
        value = plan.values[self._argument(plan, rng, ("Int", "Double", "Bool"))].val
        match type(value).__name__:
            case "Int":
                value.int_val = rng.choice((*NUMBERS, value.int_val + 1, value.int_val - 1))
            case "Double":
                value.double_val = rng.choice((0.0, -1.0, 1e300, value.double_val * 2))
            case "Bool":
                value.bool_val = not value.bool_val

    def argument(self, program: Any, rng: random.Random) -> None:
        """Give an operator another value of the program, of any type, or one fewer."""
        plan = program.execution_plan[0]
        call = rng.choice(self.calls(plan))
        if rng.random() < 0.1:
            del call.args[rng.randrange(len(call.args))]
        else:
            call.args[rng.randrange(len(call.args))] = rng.randrange(len(plan.values))

    def tensor(self, program: Any, rng: random.Random) -> None:
        """Change the sizes, the order of dimensions or the type of a tensor."""
        plan = program.execution_plan[0]
        value = plan.values[self._argument(plan, rng, ("Tensor",))].val
        at = rng.randrange(len(value.sizes))
        match rng.randrange(4):
            case 0:
                value.sizes[at] = rng.choice((0, 1, 15, 17, value.sizes[at] + 1,
                                              max(value.sizes[at] - 1, 0), value.sizes[at] * 2))
            case 1:
                rng.shuffle(value.sizes)
            case 2:
                rng.shuffle(value.dim_order)
            case 3:
                value.scalar_type = rng.choice(list(type(value.scalar_type)))

    def constant(self, program: Any, rng: random.Random) -> None:
        """Let a constant lie elsewhere, be another, or the segment be shorter."""
        plan, places = program.execution_plan[0], program.constant_segment.offsets
        match rng.randrange(3):
            case 0:
                places[rng.randrange(len(places))] = rng.choice(
                    (0, 1, rng.randrange(len(self.data)), 2**40, rng.choice(places) + 1))
            case 1:
                program.segments[0].size = rng.randrange(program.segments[0].size)
            case 2:
                constants = [each.val for each in plan.values
                             if getattr(each.val, "data_buffer_idx", 0)]
                rng.choice(constants).data_buffer_idx = rng.randrange(len(places) + 3)

    def _argument(self, plan: Any, rng: random.Random, kinds: tuple[str, ...]) -> int:
        held = [index for call in self.calls(plan) for index in call.args
                if type(plan.values[index].val).__name__ in kinds]
        return rng.choice(held)

    def write(self, kind: str, seed: int, path: Path) -> None:
        """Write the program of a kind and number to `path`."""
        rng = random.Random(f"{kind} {seed}")
        if kind == "bytes":
            data = bytearray(self.data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(self.base)] = rng.randrange(256)
            path.write_bytes(data)
            return
        if kind == "length":
            path.write_bytes(self.data[:rng.randrange(len(self.data))])
            return
        program = deepcopy(self.program)
        getattr(self, kind)(program, rng)
        with path.open("wb") as file:
            exporter.write_program(file, program, len(self.data) - self.base)
            file.write(self.data[self.base:])


KINDS = ("number", "argument", "tensor", "constant", "bytes", "length")


def outcome(path: Path, layers: int, row: Golden, chunk: int) -> str:
    """Load and run the program in `path` in a process of its own; return what came of it."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            signal.alarm(TIME_S)
            os._exit(_run(path, layers, row, chunk))
        _, status = os.waitpid(child, 0)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) < 3:
        return OUTCOMES[os.WEXITSTATUS(status)]
    checked = re.search(ITS_OWN, text)
    if os.WIFSIGNALED(status) and (LOADED not in text or checked):
        return "ended by ExecuTorch"
    return f"fault: {status} {text.strip()[-300:]}"


def _run(path: Path, layers: int, row: Golden, chunk: int) -> int:
    try:
        program = runtime.load(path, layers, threads=1)
        print(LOADED, file=sys.stderr, flush=True)
        ids = torch.tensor([row.prompt])
        for start in range(0, ids.shape[1], chunk):
            logits = program.forward(ids[:, start:start + chunk].contiguous(), start)
        return int(int(logits.argmax()) != row.tokens[0])
    except CloisterError:
        return 2
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        return 3


def attempt(bundle: Bundle, kind: str, seed: int, cases: int, folder: Path,
            told: Callable[[str], None]) -> Counter[str]:
    path, found = folder / "altered.pte", Counter[str]()
    made = Altered(bundle.path / bundle.manifest.programs[0].file)
    row, said = bundle.golden()[0], bundle.manifest
    for number in range(seed, seed + cases):
        made.write(kind, number, path)
        what = outcome(path, said.shape.layers, row, said.prefill_chunk)
        found[what.partition(":")[0]] += 1
        if what.startswith("fault"):
            told(f"{kind}, {number}: {what}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    given = parser.parse_args()
    own_operators()  # once, before processes part
    rows, faults = [("what is altered", "tried", *OUTCOMES)], list[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = Bundle.open(given.bundle) if given.bundle else exported(folder)
        for kind in [given.only] if given.only else KINDS:
            found = attempt(bundle, kind, given.seed, given.count, folder, faults.append)
            rows.append((kind, str(found.total()), *(str(found[each]) for each in OUTCOMES)))
            print(*rows[-1], sep=" | ", flush=True)
    if not given.only:
        line = ["| " + " | ".join(row) + " |" for row in rows]
        line.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
        HERE.with_suffix(".md").write_text(
            "# Altered programs of Cloister's own operators\n\n"
            f"`python tests/campaigns/programs.py --count {given.count} --seed {given.seed}`, "
            f"executorch {version('executorch')}, Python {platform.python_version()}, "
            f"{platform.system()} {platform.machine()}, {processor()}\n\n" + "\n".join(line) + "\n",
            "utf-8")
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
