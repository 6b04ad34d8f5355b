"""ExecuTorch's wheel on this machine, with XNNPACK's weights cache on as in builds for phones."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.phone import answers

WHERE = f"{platform.machine()} wheel {version('executorch')}, weights cache on"


def rows(bundles: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    for path in bundles:
        yield from answers.rows(path, WHERE)
