"""What of a bundle's way into an app was run here, what was compiled, and what is only written.

    python tests/campaigns/phone.py [BUNDLE ...] [--slow] [--only PLATFORM] [--json]

Prints the rows of every `tests/campaigns/phone/PLATFORM.py`, and writes them into `phone.md` beside
this file. Without a name the shipped bundles are meant. `--slow` takes what needs minutes, too.

A platform's module has `rows(bundles)`, which gives (what, where, result, how), `how` being run,
compiled or written; `SLOW = True` where only `--slow` runs it; and `VERSIONS`, of what it ran. A
result that begins with "not run" says what is missing. What fails is a row, too, and exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from cloister import family
from cloister.tiers import Tier

HERE = Path(__file__).parent
Row = tuple[str, str, str, str]
HEAD = ("what", "where", "result", "how")


def modules(only: str | None, slow: bool) -> Iterator[ModuleType]:
    """Yield the platforms' modules, loaded by path: their directory has the name of this file."""
    for file in sorted(HERE.joinpath("phone").glob("*.py")):
        if only in (None, file.stem):
            spec = importlib.util.spec_from_file_location(f"phone_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if hasattr(module, "rows") and (slow or only or not getattr(module, "SLOW", False)):
                yield module


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor()


def markdown(rows: Sequence[Row], versions: dict[str, str]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    table = "\n".join(map(line, [HEAD, ("---",) * len(HEAD), *rows]))
    return f"# On a phone, without one\n\n{said}\n\n{table}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--only", metavar="PLATFORM")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[1]))  # for tests.phone
    bundles = [family.bundle(name) for name in given.bundles or Tier]
    versions = {"Python": platform.python_version(),
                "on": f"{platform.system()} {platform.machine()}, {processor()}",
                "cloister": version("cloister"), "executorch": version("executorch")}
    rows, failed, began = list[Row](), False, time.perf_counter()
    for module in modules(given.only, given.slow):
        try:
            for row in module.rows(bundles):
                rows.append(row)
                print(*row, sep=" | ", file=sys.stderr, flush=True)
        except Exception as error:  # the others' rows are wanted all the same
            failed = True
            name = module.__name__.removeprefix("phone_")
            rows.append((name, "-", f"failed: {type(error).__name__}: {error}", "run"))
            print(*rows[-1], sep=" | ", file=sys.stderr)
        versions |= getattr(module, "VERSIONS", {})
    text = markdown(rows, versions)
    if not given.only:
        HERE.joinpath("phone.md").write_text(text)
    took_s = round(time.perf_counter() - began, 1)
    print(json.dumps({"versions": versions, "took_s": took_s,
                      "rows": [dict(zip(HEAD, row, strict=True)) for row in rows]})
          if given.json else text)
    return failed


if __name__ == "__main__":
    sys.exit(main())
