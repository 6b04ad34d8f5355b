"""The glue for iOS: parsed, never compiled, since Debian has no Swift."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from cloister.bundle import Bundle
from cloister.embed.write import embed

WHERE = "the glue for iOS, tree-sitter's grammar of Swift"


def rows(bundles: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    """Yield what, where, result and how."""
    if importlib.util.find_spec("tree_sitter_swift") is None:
        yield "the sources are Swift", WHERE, "not run: no package tree-sitter-swift", "written"
    else:
        from tests.phone.swift import faults

        for path in bundles:
            bundle = Bundle.open(path)
            with tempfile.TemporaryDirectory() as work:
                embed(bundle, "ios", Path(work, "glue"))
                found = {source.name: faults(source.read_text())
                         for source in Path(work).rglob("*.swift")}
            wrong = {name: lines for name, lines in found.items() if lines}
            yield (f"the sources are Swift, {bundle.manifest.name}",
                   f"{WHERE} {version('tree-sitter-swift')}",
                   str(wrong) if wrong else f"{len(found)} files parsed", "written")
    yield ("the glue on a device", "iOS", "steps and expected output: glue/ios/README.md",
           "written")
