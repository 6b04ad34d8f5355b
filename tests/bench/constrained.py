"""What following the tools costs and brings: every held-out SNIPS request, free and constrained.

    python tests/bench/constrained.py --data DIR [--tier nano-1] [--limit N]

Prints one JSON object: the share of answers that are valid calls, the share of exact frames, and
the time of all answers, constrained over free, each request answered both ways in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from cloister import Engine, Session, reference
from cloister.evaluate.tasks import correct
from cloister.reference.mixture import development
from cloister.runtime.tools import tool_calls


def valid(text: str, tools: list[dict]) -> bool:
    """Whether `text` is one call of a known tool, with known arguments of the right types."""
    calls = tool_calls(text)
    known = {tool["name"]: tool["parameters"]["properties"] for tool in tools}
    return len(calls) == 1 and calls[0].name in known and all(
        slot in known[calls[0].name] and ((isinstance(value, str) and value) or (
            isinstance(value, list) and len(value) > 1
            and all(isinstance(part, str) and part for part in value)))
        for slot, value in calls[0].arguments.items())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tier", default="nano-1")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    examples = development(options.data)["call"][:options.limit]
    engine, tools = Engine(reference.find(options.tier)), reference.tools()
    answers: dict[str, list[str]] = {"free": [], "constrained": []}
    seconds: dict[str, list[float]] = {"free": [], "constrained": []}
    for number, example in enumerate(examples):
        kinds = ["free", "constrained"] if number % 2 else ["constrained", "free"]
        for kind in kinds:
            engine.truncate(0)  # each reads the request anew
            session = Session(engine, system="call")
            began = time.perf_counter()
            text = session.ask(
                example.input, tools=tools if kind == "constrained" else None).content
            seconds[kind].append(time.perf_counter() - began)
            answers[kind].append(text)
    record = {"tier": options.tier, "n": len(examples)}
    for kind, texts in answers.items():
        right = correct(examples, texts)
        record[kind] = {
            "valid": sum(valid(text, tools) for text in texts) / len(texts),
            "frame_exact": sum(right) / len(right),
            "median_ms": round(1000 * statistics.median(seconds[kind]), 3),
            "seconds": round(sum(seconds[kind]), 2),
        }
    record["time_ratio"] = round(sum(seconds["constrained"]) / sum(seconds["free"]), 4)
    record["median_ratio"] = round(statistics.median(
        one / other for one, other in zip(seconds["constrained"], seconds["free"], strict=True)), 4)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
