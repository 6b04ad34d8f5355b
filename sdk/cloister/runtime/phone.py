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

import msgspec
import torch

from cloister import pattern
from cloister.pieces import MediaFormats
from cloister.runtime import _executorch, encoded
from cloister.runtime.core import DIGEST_BYTES, Core, MediaPosition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.bundle import Golden
    from cloister.runtime._executorch import ExecutorchProgram
    from cloister.runtime.core import Position
    from cloister.runtime.encoded import Medium

__all__ = ["complaint"]


def complaint(
    program: Path, layers: int, rows: Sequence[Golden], chunk: int,
    media: MediaFormats | None = None,
) -> str | None:
    """Return how a program fails on golden `rows` that way; None where it does not.

    All methods are tried, `score` in calls of at most `chunk` tokens.
    """
    asked = {"program": str(program), "layers": layers, "chunk": chunk,
             "rows": [[row.prompt, row.tokens, row.media and [row.media.kind, row.media.seed]]
                      for row in rows],
             "media": msgspec.to_builtins(media)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__], input=json.dumps(asked).encode(),
        capture_output=True, check=False)
    if done.returncode:
        return f"it ended the process ({done.returncode})"
    wrong = json.loads(done.stdout.splitlines()[-1])
    return f"{wrong} of {len(rows)} golden prompts give other tokens" if wrong else None


def _main() -> None:
    asked = json.load(sys.stdin)
    _executorch.share_weights()
    program = _executorch.load(Path(asked["program"]), asked["layers"])
    wrong, chunk = 0, asked["chunk"]
    media = msgspec.convert(asked["media"], MediaFormats | None)
    for prompt, tokens, noise in asked["rows"]:
        if media is not None and noise is not None:
            wrong += _wrong_after_media(
                program, media, pattern.of(media, *noise), prompt, tokens, chunk)
            continue
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


def _wrong_after_media(
    program: ExecutorchProgram, media: MediaFormats, part: Medium, prompt: list[int],
    tokens: list[int], chunk: int,
) -> bool:
    """Whether other `tokens` come after `part` and `prompt`, as tokens or embedded."""
    form, ids = media.of(part), prompt + tokens
    vectors = encoded.encode(program, form, part)
    shown = encoded.positions(form, bytes(DIGEST_BYTES), vectors, len(vectors))
    embedded = torch.cat([
        program.call("token_embedding", torch.tensor([ids[at:at + chunk]]))[0][0].clone()
        for at in range(0, len(ids), chunk)])
    as_vectors = [MediaPosition(b"\1" * DIGEST_BYTES, at, embedded) for at in range(len(ids))]

    def answer(text: Sequence[Position]) -> list[int]:
        whole = [*shown, *text]
        core = Core(program, name="", context=len(whole), chunk=chunk, reads_media=True)
        return [int(core.extend(whole[:end]).argmax())
                for end in range(len(whole) - len(tokens), len(whole))]

    return tokens != answer(ids) or tokens != answer(as_vectors)


if __name__ == "__main__":
    _main()
