"""What guessed tokens bring: questions without, with lookup and with a lower tier, in turns.

    python tests/bench/drafting.py call TARGET --data DIR [--lower BUNDLE...] [--limit N]
    python tests/bench/drafting.py texts TARGET [--lower BUNDLE...] [--tokens N]
    python tests/bench/drafting.py needed TARGET DRAFTER [--position N]

`call` asks the held-out SNIPS requests of the task `call`, free and held to the tools; `texts` has
questions whose answers repeat their prompt, code, and chat. Each question is asked in every way in
turn, in one process, and answered greedily; of each way: tokens a second after the first, and what
they are of those without guesses, over all answers and as the median of the answers; how many were
guessed and how many of these were right; and how many answers are the same. The first WARM
questions only warm up.

`needed` takes the times of both bundles' calls at a position, whatever their weights, and prints
the acceptance at which a draft of each length would be as fast as plain decoding, and the speed-up
at acceptances from 0.5 to 1. For the full shapes: of bundles that `cloister bench` would make.

Each prints one JSON object. CLOISTER_HOME, threads and the machine are the surroundings' own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cloister import Engine, Session, reference
from cloister.reference.mixture import development
from cloister.runtime.core import Rows
from cloister.settings import processors

WARM = 20
LENGTHS = (1, 2, 3, 4, 5, 7, 11, 15)
REPEATS = 15
NOTE = """The board met on Tuesday the 4th of March in the old town hall. Present were Anna
Lindqvist, Peter Okafor, Maria del Carmen Ruiz and the treasurer, John Whitfield. The minutes of
the meeting in February were approved. John Whitfield reported that the roof of the community hall
will cost 48,200 euros, of which 31,000 are covered by the grant. Maria del Carmen Ruiz proposed to
raise the rest by a summer fair on the 21st of June. The proposal was accepted with three votes to
one."""
CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("The amount must be positive.")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("The balance is too low.")
        self.balance -= amount
"""
TEXTS = {
    "edit": [
        f"Correct the spelling of this text and repeat it in full:\n\n{NOTE}",
        f"Repeat this text, but write Wednesday in place of Tuesday:\n\n{NOTE}"],
    "summary": [
        f"Summarise this text in three sentences:\n\n{NOTE}",
        f"List the names of the people in this text, and what each of them did:\n\n{NOTE}"],
    "code": [
        f"Add a method transfer(self, other, amount) to this class:\n\n{CODE}",
        "Write a Python function that reads a CSV file and returns the mean of each column."],
    "chat": [
        "What should I see in Rome in two days?", "Tell me a story about a fox and a lighthouse.",
        "How does a heat pump work?", "Give me five ideas for the birthday of a ten year old."],
}


class Ways:
    """One target, guessed for in several ways, and what was found of each."""

    def __init__(self, target: str, lower: list[str], threads: int | None) -> None:
        names = ["off", "lookup", *lower]
        self.engines = {Path(name).name: Engine(
            reference.find(target), threads=threads,
            draft=str(reference.find(name)) if name in lower else name) for name in names}
        self.found: dict[str, list[dict[str, Any]]] = {}

    def ask(self, question: str, number: int, *, keep: str | None, **options: Any) -> None:
        """Ask in every way, in an order that goes round; `keep` is the kind of question."""
        names = list(self.engines)
        names = names[number % len(names):] + names[:number % len(names)]
        rows = {}
        for name in names:
            engine = self.engines[name]
            engine.truncate(0)  # each reads the question anew
            session = Session(engine, system=options.get("system"))
            ids = [token.id for token in session.stream(
                question, max_tokens=options.get("max_tokens"), tools=options.get("tools"))]
            stats = session.stats
            rows[name] = {"ids": ids, "steps": stats.tokens - 1, "s": stats.decode_s,
                          "drafted": stats.drafted_tokens, "accepted": stats.accepted_tokens}
        if keep is not None and rows["off"]["steps"] > 0:
            self.found.setdefault(keep, []).append(rows)

    def record(self) -> dict[str, Any]:
        """Return what was found, by kind and way."""
        return {kind: {name: _summed([row[name] for row in rows], [row["off"] for row in rows])
                       for name in self.engines} for kind, rows in self.found.items()}


def _summed(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    steps, seconds = (sum(row[key] for row in rows) for key in ("steps", "s"))
    ratios = [(row["steps"] / row["s"]) / (other["steps"] / other["s"])
              for row, other in zip(rows, plain, strict=True) if row["steps"] > 0]
    same = [row["ids"] == other["ids"] for row, other in zip(rows, plain, strict=True)]
    return {
        "tokens_per_s": round(steps / seconds, 1),
        "ratio": round(steps / seconds * sum(row["s"] for row in plain) / sum(
            row["steps"] for row in plain), 3),
        "median_ratio": round(statistics.median(ratios), 3),
        "tokens": steps, "drafted": sum(row["drafted"] for row in rows),
        "accepted": sum(row["accepted"] for row in rows), "same": f"{sum(same)} of {len(same)}",
    }


def call(options: argparse.Namespace) -> dict[str, Any]:
    """Ask the held-out requests of the task `call`."""
    ways = Ways(options.target, options.lower, options.threads)
    for number, example in enumerate(development(options.data)["call"][:options.limit]):
        for kind, tools in (("free", None), ("constrained", reference.tools())):
            ways.ask(example.input, number, keep=kind if number >= WARM else None, system="call",
                     tools=tools)
    return ways.record()


def texts(options: argparse.Namespace) -> dict[str, Any]:
    """Ask what is answered out of the prompt, code and chat."""
    ways = Ways(options.target, options.lower, options.threads)
    ways.ask("Say hello.", 0, keep=None, max_tokens=20)
    for number, (kind, question) in enumerate(
        (kind, question) for _ in range(options.rounds)
        for kind, each in TEXTS.items() for question in each
    ):
        ways.ask(question, number, keep=kind, max_tokens=options.tokens)
    return ways.record()


def needed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the acceptance at which a draft of each length is as fast as plain decoding."""
    engines = {"target": Engine(reference.find(options.target), draft="lookup",
                                threads=options.threads),
               "drafter": Engine(reference.find(options.drafter), draft="off",
                                 threads=options.threads)}
    ids = torch.randint(5, 250, (options.position,), generator=torch.Generator().manual_seed(0))
    text: list[Any] = ids.tolist()
    for engine in engines.values():
        engine.extend(text)
    target = engines["target"]
    step_s = _seconds(lambda: target.extend(text))
    draft_s = _seconds(lambda: engines["drafter"].extend(text))
    record: dict[str, Any] = {"step_ms": 1000 * step_s, "draft_ms": 1000 * draft_s, "lengths": {}}
    for length in LENGTHS:
        def verify(length: int = length) -> None:
            target.truncate(len(text) - 1 - length)
            target.extend(text, Rows.ALL)

        verify_s = _seconds(verify)
        record["lengths"][length] = {
            "verify_ms": 1000 * verify_s,
            "acceptance_needed_with_lookup": _needed(length, verify_s / step_s),
            "acceptance_needed": _needed(length, (verify_s + length * draft_s) / step_s),
            "ratio_at_acceptance": {
                share: round(_expected(length, share) * step_s / (verify_s + length * draft_s), 3)
                for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)},
        }
    return record


def _seconds(work: Any) -> float:
    def timed() -> float:
        began_s = time.perf_counter()
        work()
        return time.perf_counter() - began_s

    timed()  # loads the method
    return statistics.median(timed() for _ in range(REPEATS))


def _expected(length: int, acceptance: float) -> float:
    """Tokens of a call that verifies a draft, the one behind it included."""
    return sum(acceptance**power for power in range(length + 1))


def _needed(length: int, cost: float) -> float | None:
    """Return the least acceptance at which a draft brings `cost` tokens; None: there is none."""
    if _expected(length, 1.0) < cost:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _expected(length, middle) >= cost else (middle, high)
    return round(high, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, work in (("call", call), ("texts", texts), ("needed", needed)):
        kind = kinds.add_parser(name)
        kind.set_defaults(work=work)
        kind.add_argument("target", metavar="TARGET")
        kind.add_argument("--threads", type=int)
        if name == "needed":
            kind.add_argument("drafter", metavar="DRAFTER")
            kind.add_argument("--position", type=int, default=100)
        else:
            kind.add_argument("--lower", nargs="*", default=[], metavar="BUNDLE")
    kinds.choices["call"].add_argument("--data", type=Path, required=True)
    kinds.choices["call"].add_argument("--limit", type=int)
    kinds.choices["texts"].add_argument("--tokens", type=int, default=200)
    kinds.choices["texts"].add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps({
        "kind": options.kind, "target": Path(options.target).name, "torch": torch.__version__,
        "processors": processors(), "python": sys.version.split()[0], **options.work(options)}))


if __name__ == "__main__":
    main()
