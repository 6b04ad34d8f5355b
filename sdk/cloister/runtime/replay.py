"""Replay files: what was asked and the ids that came, so that another run can prove the same.

A replay file holds the conversation in plain text. It is written only when asked for.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.errors import OutputExists, ReplayError
from cloister.runtime.sampling import Sampling
from cloister.runtime.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.runtime.engine import Engine

__all__ = ["replay", "write"]

FORMAT = 1


def write(
    path: str | Path,
    *,
    model_id: str,
    system: str | None,
    prompt: str,
    max_tokens: int | None,
    sampling: Sampling,
    tokens: Sequence[int],
) -> None:
    """Write one exchange, readable by its owner only.

    Raises:
        OutputExists: there is such a file already.
        ReplayError: it cannot be written; nothing is left of it.
    """
    record = {
        "format": FORMAT, "model_id": model_id, "system": system, "prompt": prompt,
        "max_tokens": max_tokens, "sampling": asdict(sampling), "tokens": list(tokens),
    }
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise OutputExists(f"Output {Path(path).name} exists already; name another.") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  # a descriptor
            json.dump(record, file, indent=1)
    except BaseException as error:
        Path(path).unlink()
        if isinstance(error, OSError):
            raise _unwritable(path, error) from None
        raise


def replay(engine: Engine, path: str | Path) -> int:
    """Run the exchange in `path` again, and give the number of tokens that agreed: all of them.

    Raises:
        ReplayError: the file is malformed, of another model, drawn without a seed, or a token
            differs.
    """
    path = Path(path)
    malformed = ReplayError(f"{path.name} is no replay file of format {FORMAT}; write it again.")
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise malformed
        sampling = Sampling(**record["sampling"])
        expected, model_id = [int(id_) for id_ in record["tokens"]], str(record["model_id"])
        system, prompt, limit = record["system"], record["prompt"], record["max_tokens"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise malformed from None
    if not (
        isinstance(prompt, str) and isinstance(system, str | None) and isinstance(limit, int | None)
    ):
        raise malformed
    if model_id != engine.model_id:
        raise ReplayError(
            f"{path.name} was made with another model than bundle {engine.bundle.path.name}; use "
            "that one."
        )
    if sampling.temperature > 0 and sampling.seed is None:
        raise ReplayError(f"{path.name} was drawn without a seed; write it again with --seed.")
    session = Session(engine, system=system)
    got = [token.id for token in session.stream(prompt, max_tokens=limit, sampling=sampling)]
    for position, (wanted, came) in enumerate(zip(expected, got, strict=False)):
        if wanted != came:
            raise ReplayError(
                f"{path.name} gives another token at position {position}; run it on the kind of "
                "processor that wrote it."
            )
    if len(got) != len(expected):
        raise ReplayError(
            f"{path.name} has {len(expected)} tokens and the replay gave {len(got)}; run it on "
            "the kind of processor that wrote it."
        )
    return len(got)


def _unwritable(path: str | Path, error: OSError) -> ReplayError:
    return ReplayError(
        f"{Path(path).name} cannot be written ({error.strerror}); name a place that can be."
    )
