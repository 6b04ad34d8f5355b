"""A process that searches texts by regular expressions and JSON Schemas, and can be killed.

An expression can take longer than the universe on a few characters, and nothing ends a search in
the process that runs it. It runs as a script, on what is installed and on nothing of ours: each
line of its input is a list of a kind, an expression or schema, and a text, and is answered by a
line.
"""

from __future__ import annotations

import json
import re
import sys


def answer(kind: str, pattern: object, text: str) -> str:
    """Return "yes" or "no", or where that cannot be told the type of the error."""
    try:
        if kind == "regex":
            return "yes" if re.search(str(pattern), text) else "no"
        from jsonschema.validators import validator_for  # type: ignore[import-untyped]
        from referencing.jsonschema import EMPTY_REGISTRY

        assert isinstance(pattern, dict)
        validator = validator_for(pattern)
        if kind == "check":
            validator.check_schema(pattern)
            return "yes"
        # With a registry of one's own nothing is fetched that a $ref names.
        return "yes" if validator(pattern, registry=EMPTY_REGISTRY).is_valid(
            json.loads(text)) else "no"
    except Exception as error:
        return type(error).__name__


if __name__ == "__main__":
    for line in sys.stdin.buffer:
        print(answer(*json.loads(line)), flush=True)  # noqa: T201
