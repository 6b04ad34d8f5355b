"""What a worker costs a token beyond the engine: the same answers here and in a worker, in turns.

    python tests/bench/worker.py [--tier nano-1] [--rounds 9]

Prints one JSON object: milliseconds a token of both, medians over the rounds, and the median of
their differences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from cloister import Chat, Engine, Sampling, Session, Worker

TOKENS = 600


def ms_a_token(chat: Chat, seed: int) -> float:
    """Time between the first token and the last, a token."""
    tokens = chat.stream(
        "Tell me a story.", max_tokens=TOKENS, sampling=Sampling(temperature=3.0, seed=seed))
    next(tokens)
    began = time.perf_counter()
    count = sum(1 for _ in tokens)
    return 1000 * (time.perf_counter() - began) / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tier", default="nano-1")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    engine, here, there = Engine(options.tier), [], []
    with Worker(options.tier) as worker:
        for seed in range(options.rounds):
            here.append(ms_a_token(Session(engine), seed))
            there.append(ms_a_token(worker.session(), seed))
    print(json.dumps({
        "tier": options.tier, "tokens": TOKENS, "rounds": options.rounds,
        "session_ms": round(statistics.median(here), 4),
        "worker_ms": round(statistics.median(there), 4),
        "difference_ms": round(statistics.median(
            two - one for one, two in zip(here, there, strict=True)), 4),
    }))


if __name__ == "__main__":
    main()
