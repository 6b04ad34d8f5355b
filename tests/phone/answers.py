"""How much of a bundle's golden answers a wheel of ExecuTorch gives, with the weights cache on.

`rows` asks in a process of an interpreter, which may be one of another processor. That process
needs torch, executorch, tokenizers, msgspec and platformdirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tests.phone.golden import same, spoken

from cloister.bundle import Bundle

ROOT = Path(__file__).parents[2]


def rows(path: Path, where: str, interpreter: Sequence[str] = (sys.executable,),
         environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Return rows of the campaign's table for the bundle in `path`."""
    environment = environment or os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*interpreter, "-m", __name__, path], cwd=ROOT, env=environment,
                          capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = dict.fromkeys(("our loop", "teacher-forced", "stock runner"),
                             f"exit code {done.returncode}: {done.stderr.strip()[-200:]}")
    else:
        said = json.loads(done.stdout)
    name = Bundle.open(path).manifest.name
    for how in ("our loop", "stock runner"):
        yield f"golden answers of {name}", f"{where}, {how}", said[how], "run"
    yield (f"tokens of golden answers of {name}, teacher-forced", f"{where}, our loop",
           said["teacher-forced"], "run")


def by_our_loop(bundle: Bundle) -> tuple[str, str]:
    """Return how many answers are the same, and how many tokens where those before are given."""
    import torch

    from cloister.runtime import _executorch

    _executorch.share_weights()
    program = _executorch.load(bundle.path / bundle.manifest.programs[0].file,
                               bundle.manifest.shape.layers)
    chunk, right, tokens, golden = bundle.manifest.prefill_chunk, list[bool](), 0, bundle.golden()
    for row in golden:
        ids_T, end = torch.tensor([row.prompt + row.tokens[:-1]]), len(row.prompt)
        ends = [0, *range(chunk, end, chunk), *range(end, ids_T.shape[1] + 1)]
        found = [int(program.forward(ids_T[:, first:last].contiguous(), first).argmax())
                 for first, last in pairwise(ends)][-len(row.tokens):]
        right.append(tuple(found) == row.tokens)
        tokens += sum(map(int.__eq__, found, row.tokens))
    return same(golden, right), f"{tokens} of {sum(len(row.tokens) for row in golden)}"


def by_the_stock_runner(bundle: Bundle) -> str:
    """Return how many answers are the same, as texts."""
    from tests.phone.runner import stock

    llm = stock()
    program, asked = bundle.path / bundle.manifest.programs[0].file, spoken(bundle)
    right = list[bool]()
    runner = llm.TextLLMRunner(str(program), str(bundle.tokenizer_path))
    for row in asked:
        config = llm.GenerationConfig(max_new_tokens=row.tokens, temperature=0.0, echo=False)
        pieces = list[str]()
        runner.generate(row.prompt, config, pieces.append)
        runner.reset()
        right.append("".join(pieces) == row.answer)
    return same(asked, right)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as found:
        os.dup2(2, 1)  # where the stock runner prints what it says, and more
        opened = Bundle.open(Path(sys.argv[1]))
        ours, forced = by_our_loop(opened)
        json.dump({"our loop": ours, "teacher-forced": forced,
                   "stock runner": by_the_stock_runner(opened)}, found)
