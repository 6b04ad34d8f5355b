"""A peer's part of a benchmark, for an interpreter that has the peer and maybe no Cloister.

    PYTHON FOLDER_OF_THIS_FILE MODULE versions PACKAGE...
    PYTHON FOLDER_OF_THIS_FILE MODULE convert SOURCE OUT
    PYTHON FOLDER_OF_THIS_FILE MODULE speed MODEL CONTEXT THREADS PREFILLS POSITIONS STEPS

MODULE is one of the files beside this one. `speed` measures as `cloister.evaluate.speed` does. One
JSON object is printed, as the last line. A module may have commands of its own.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Model(Protocol):
    """A loaded model that has read some tokens; threads and context are given when it is made."""

    def clear(self) -> None:
        """Forget what was read."""

    def read(self, count: int) -> None:
        """Read more tokens at once, and give the logits after the last."""


def versions(*packages: str) -> dict[str, str | None]:
    """Return the version of each package that is installed, None for others."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def convert(module: Any, source: str, out: str) -> dict[str, float]:
    """Make the peer's own 4-bit model of a folder of transformers'; return time and memory."""
    begun = time.perf_counter()
    module.convert(source, out)
    return {"convert_s": time.perf_counter() - begun,
            "convert_peak_bytes": _memory("VmHWM")}


def speed(
    module: Any, path: str, context: str, threads: str, prefills: str, positions: str, steps: str
) -> dict[str, Any]:
    """Measure load time, memory, and tokens a second.

    The first token is one read into an empty context. Prefills are medians of 3, decode speeds
    those of so many steps after each position.
    """
    empty = _anonymous()
    begun = time.perf_counter()
    model: Model = module.Model(path, int(context), int(threads))
    load_s = time.perf_counter() - begun

    def timed(call: Callable[[], object]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    def prefill(length: int) -> float:
        model.clear()
        return timed(lambda: model.read(length))

    first_s = timed(lambda: model.read(1))
    prefilled = {str(n): n / statistics.median(prefill(n) for _ in range(3))
                 for n in json.loads(prefills)}
    decoded = {}
    for place in json.loads(positions):
        model.clear()
        if place:
            model.read(place)
        decoded[str(place)] = 1 / statistics.median(
            timed(lambda: model.read(1)) for _ in range(int(steps)))
    return {
        "load_s": load_s, "first_token_s": first_s, "anon_bytes": _anonymous(),
        "empty_bytes": empty, "prefill_tokens_per_s": prefilled, "decode_tokens_per_s": decoded,
    }


def _anonymous() -> int:
    """Return the bytes that this process holds and no file has."""
    return _memory("RssAnon")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


if __name__ == "__main__":
    name, command, *arguments = sys.argv[1:]
    found: dict[str, Any]
    if command == "versions":  # of packages that the module imports: they may be missing
        found = versions(*arguments)
    else:
        module = importlib.import_module(name)  # a file beside this one: their folder comes first
        found = (convert(module, *arguments) if command == "convert"
                 else speed(module, *arguments) if command == "speed"
                 else getattr(module, command)(*arguments))
    print(json.dumps(found))  # noqa: T201
