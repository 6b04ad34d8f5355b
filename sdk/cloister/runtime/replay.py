"""Replay files: what was asked and the ids that came, so that another run can prove the same.

A replay file holds the conversation in plain text. It is written only when asked for.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import OutputExists, ReplayError
from cloister.files import whole_file
from cloister.runtime.chat import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.runtime.chat import Chat

__all__ = ["Replay", "read", "replay", "write"]

FORMAT = 1


class Replay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One exchange."""

    format: int = FORMAT
    model_id: str
    system: str | None
    prompt: str
    max_tokens: int | None
    sampling: Sampling
    tokens: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Replay({len(self.tokens)} tokens)"


def write(path: str | Path, exchange: Replay) -> None:
    """Write one exchange, readable by its owner only.

    Raises:
        OutputExists: there is such a file already.
        OutputUnwritable, NotEnoughDisk: it cannot be written; nothing is left of it.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise OutputExists(f"Output {path.name} exists already; name another.")
    with whole_file(path, private=True) as file:
        file.write(json.dumps(msgspec.to_builtins(exchange), indent=1).encode())


def read(path: str | Path) -> Replay:
    """Read what `write` wrote.

    Raises:
        ReplayError: it is malformed, or was drawn without a seed.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        exchange = msgspec.json.decode(data, type=Replay)
        known = {field.name for field in fields(Sampling)}
        if exchange.format != FORMAT or not known.issuperset(json.loads(data)["sampling"]):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        raise ReplayError(
            f"{path.name} is no replay file of format {FORMAT}; write it again.") from None
    if exchange.sampling.temperature > 0 and exchange.sampling.seed is None:
        raise ReplayError(f"{path.name} was drawn without a seed; write it again with --seed.")
    return exchange


def replay(path: str | Path, model_id: str, begin: Callable[[str | None], Chat]) -> int:
    """Ask what is in `path` again; return the number of tokens that agreed: all of them.

    `begin` gives a conversation with a system prompt, of the model called `model_id`.

    Raises:
        ReplayError: see `read`; or it is of another model, or a token differs.
    """
    exchange, name = read(path), Path(path).name
    if exchange.model_id != model_id:
        raise ReplayError(f"{name} was made with another bundle; use that one.")
    chat = begin(exchange.system)
    got = tuple(token.id for token in chat.stream(
        exchange.prompt, max_tokens=exchange.max_tokens, sampling=exchange.sampling))
    if got != exchange.tokens:
        pairs = enumerate(zip(exchange.tokens, got, strict=False))
        position = next(
            (number for number, (old, new) in pairs if old != new),
            min(len(got), len(exchange.tokens)))
        raise ReplayError(
            f"{name} gives another token at position {position}; run it on the kind of processor "
            "that wrote it."
        )
    return len(got)
