"""Whether a program runs as on phones: with XNNPACK's weights cache on, its file let go of.

The cache frees every constant of a delegate when it has packed them; the file is mapped here, so
that what is read later all the same ends the process. Hence a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.bundle import Golden

__all__ = ["complaint"]


def complaint(program: Path, layers: int, rows: Sequence[Golden], chunk: int) -> str | None:
    """Return how a program fails on golden `rows` that way; None where it does not.

    Both methods are tried, `score` in calls of at most `chunk` tokens.
    """
    asked = {"program": str(program), "layers": layers, "chunk": chunk,
             "rows": [[row.prompt, row.tokens] for row in rows]}
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__], input=json.dumps(asked).encode(),
        capture_output=True, check=False)
    if done.returncode:
        return f"it ended the process ({done.returncode})"
    wrong = json.loads(done.stdout.splitlines()[-1])
    return f"{wrong} of {len(rows)} golden prompts give other tokens" if wrong else None


def _main() -> None:
    import torch

    from cloister.runtime import _executorch

    asked = json.load(sys.stdin)
    _executorch.share_weights()
    program = _executorch.load(Path(asked["program"]), asked["layers"])
    wrong, chunk = 0, asked["chunk"]
    for prompt, tokens in asked["rows"]:
        ids_T = torch.tensor([prompt + tokens[:-1]])
        end, total = len(prompt), ids_T.shape[1]

        def read(method: Any, ends: list[int], ids_T: torch.Tensor = ids_T) -> list[int]:
            rows = [method(ids_T[:, first:last].contiguous(), first)
                    for first, last in pairwise([0, *ends])]
            return [int(row) for part in rows for row in part.argmax(-1).flatten()]

        one_by_one = list(range(end, total + 1))
        found = read(program.forward, [*range(chunk, end, chunk), *one_by_one])
        scored = read(program.score, [*range(chunk, total, chunk), total])
        count = len(tokens)
        wrong += found[-count:] != tokens or scored[-count:] != tokens
    print(wrong)  # noqa: T201


if __name__ == "__main__":
    _main()
