"""Writes the tables of README.md beside this file from the records of `cloister bench --against`.

    python tests/bench/table.py

The records are `results/*.json`, each what the command printed with `--json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cloister.commands import bench_tables

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def markdown(name: str, record: dict[str, Any]) -> str:
    """Return what a record says, with its command, date and versions."""
    versions = ", ".join(f"{package} {version}" for found in record["versions"].values()
                         for package, version in found.items())
    lines = [f"### {name}", "", f"`{record['command']}`, {record['date']}; {versions}.", ""]
    lines += [f"Left out: {name}: {said}" for name, said in record["left_out"].items()]
    for title, columns, rows in bench_tables.against(record):
        lines += [f"{title}.", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|",
                  *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join(lines)


def main() -> None:
    readme = HERE / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    if END not in rest:
        sys.exit(f"{readme.name} has no place for the tables: the lines {BEGIN!r} and {END!r}.")
    tables = [markdown(path.name, json.loads(path.read_text("utf-8")))
              for path in sorted((HERE / "results").glob("*.json"))]
    readme.write_text(
        "\n".join((before + BEGIN, "", *tables, END)) + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
