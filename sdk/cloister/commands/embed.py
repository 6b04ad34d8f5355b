"""The command that writes an app's part of a bundle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cloister import display
from cloister.bundle import Bundle
from cloister.commands.options import Options, Record
from cloister.embed.write import embed as write
from cloister.files import check_output

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Embed", "embed"]


@dataclass(frozen=True, kw_only=True)
class Embed(Options):
    """The options of `cloister embed`."""

    bundle: str
    platform: str
    output: Path
    force: bool


def embed(args: Embed) -> Record:
    """Write what an app needs of a bundle."""
    check_output(args.output, kind="app", replace=args.force)
    facts = write(Bundle.open(args.bundle), args.platform, args.output, replace=args.force)
    files = sorted(
        (str(path.relative_to(args.output)), path.stat().st_size)
        for path in args.output.rglob("*") if path.is_file())
    if not args.json:
        display.table(f"{args.output.name}: {facts.name} for {args.platform}", ("file", "size"), [
            (name, display.bytes_text(size)) for name, size in files])
        display.show(f"Read {args.output.name}/README.md next.")
    return {
        "output": args.output.name, "platform": args.platform, "name": facts.name,
        "executorch": facts.executorch, "memory_bytes": facts.memory_bytes,
        "program": asdict(facts.program), "files": dict(files),
    }
