"""What each command does. Each takes its typed options, shows people a result unless `--json` is
given, and returns the record that `--json` prints."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from cloister.commands.options import Options, Record

__all__ = ["run"]

# Of each command: its module, its options and its function.
_COMMANDS = {
    "bench": ("measure", "Bench", "bench"),
    "chat": ("use", "Chat", "chat"),
    "compare": ("use", "Compare", "compare"),
    "demo": ("demo", "Demo", "demo"),
    "distill": ("teach", "Distill", "distill"),
    "embed": ("embed", "Embed", "embed"),
    "eval": ("measure", "Eval", "eval_"),
    "export": ("make", "Export", "export"),
    "import": ("make", "Import", "import_"),
    "lab": ("lab", "Lab", "lab"),
    "quantize": ("teach", "Quantize", "quantize"),
    "replay": ("use", "Replay", "replay"),
    "run": ("use", "Run", "run"),
    "tiers": ("measure", "Tiers", "tiers"),
    "kernels": ("kernels", "Kernels", "kernels"),
    "vault": ("vault", "Vault", "vault"),
    "verify": ("measure", "Verify", "verify"),
}


def run(parsed: Namespace) -> Record | None:
    """Run the command of parsed arguments; None where another process gives the result."""
    module, options, function = _COMMANDS[parsed.command]
    home = import_module(f"cloister.commands.{module}")
    kind: type[Options] = getattr(home, options)
    call: Callable[[Options], Record | None] = getattr(home, function)
    return call(kind.of(parsed))
