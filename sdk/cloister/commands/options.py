"""What each command is asked for, typed, and what can be refused before anything heavy is imported.

A command's options have the names of its arguments (`cloister.cli`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from cloister import family
from cloister.errors import CheckpointError, DataError, SettingError
from cloister.parts import Audio, Image
from cloister.runtime.chat import Sampling

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

__all__ = ["Asking", "Options", "Record", "check_data", "checkpoint", "part", "read_json"]

Record = dict[str, Any]
"""What a command prints with `--json`."""

_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command is asked for."""

    json: bool = False
    debug: bool = False

    @classmethod
    def of(cls, parsed: Namespace) -> Self:
        """Take the options out of parsed arguments."""
        return cls(**{each.name: getattr(parsed, each.name) for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Asking(Options):
    """What a command that asks a model is asked for."""

    family: Path | None
    system: str | None = field(repr=False)
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    schema: Path | None
    tools: Path | None
    media: list[tuple[str, str]] = field(repr=False)  # image or audio, and a file or -
    trim: bool
    draft: str

    @property
    def parts(self) -> list[Image | Audio]:
        """Pictures and recordings, in the order in which they were given.

        Raises:
            MediaUnreadable, MediaTooLarge: see `Image.open`.
        """
        return [part(kind, file, trim=self.trim) for kind, file in self.media]

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen.

        Raises:
            SettingError: a value outside its bound.
        """
        return Sampling(**{each.name: getattr(self, each.name) for each in fields(Sampling)})

    @property
    def asked(self) -> dict[str, Any]:
        """What `Chat.stream` is given beside the prompt.

        Raises:
            SettingError: a value outside its bound, or a file that is no JSON.
        """
        tools = None if self.tools is None else read_json(self.tools)
        if tools is not None and not isinstance(tools, list):
            raise SettingError(f"{self.tools.name if self.tools else ''} holds no list of tools.")
        schema = None if self.schema is None else read_json(self.schema)
        if schema is not None and not isinstance(schema, dict):
            raise SettingError(f"{self.schema.name if self.schema else ''} holds no JSON Schema.")
        return {"max_tokens": self.max_tokens, "sampling": self.sampling, "schema": schema,
                "tools": tools}


def part(kind: str, file: str, *, trim: bool) -> Image | Audio:
    """Read a picture or recording out of a file, or out of the standard input.

    Raises:
        MediaUnreadable, MediaTooLarge: see `Image.open`.
    """
    source = sys.stdin.buffer if file == "-" else file
    return Image.open(source) if kind == "image" else Audio.open(source, trim=trim)


def read_json(path: Path) -> object:
    """Read a file of the user's.

    Raises:
        SettingError: it cannot be read as JSON.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise ValueError
        return json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        raise SettingError(
            f"{path.name} cannot be read as JSON; name a file that can be.") from None


def checkpoint(name: Path) -> Path:
    """Find the checkpoint at `name`, or that of a shipped tier; it is read, and checked, later.

    Raises:
        SettingError, CheckpointError: there is none.
    """
    path = family.find_checkpoint(name)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"Directory {path.name} has no config.json; name a checkpoint directory."
        )
    return path


def check_data(path: Path) -> None:
    """Raise unless there is something at `path`; it is read, and checked, later.

    Raises:
        DataError: there is nothing.
    """
    if not path.exists():
        raise DataError(f"There is no data at {path.name}; name a file or directory of examples.")
