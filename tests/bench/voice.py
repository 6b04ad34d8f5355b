"""What a spoken request costs: from the end of speech to the first token, and memory.

    python tests/bench/voice.py MULTIMODAL.cloister TEXT.cloister RECORDING [--rounds 20]

RECORDING is a WAV of 16 kHz, cut or filled up with silence to 4 s, and a little other each time, so
that nothing is put back. Each bundle is run in a process of its own on two cores. Prints one JSON
object: medians in milliseconds, with the recording decoded in its own process and without, and of a
written request; and the most memory that each process took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from cloister import Audio, Engine, Session
from cloister.parts import Recording
from cloister.runtime.memory import peak_bytes

RATE, SECONDS, CORES = 16_000, 4, 2
WRITTEN = "Will it rain in the north of Iceland on Sunday?"


def first_token_ms(engine: Engine, request: object) -> float:
    session = Session(engine, system="call")
    began = time.perf_counter()
    next(session.stream(request))
    return 1000 * (time.perf_counter() - began)


def measured(bundle: Path, recording: Path | None, rounds: int) -> dict[str, float]:
    """Measure in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    engine, rng = Engine(bundle), np.random.default_rng(0)
    speech_N = np.zeros(0) if recording is None else soundfile.read(recording)[0]
    speech_N = np.resize(np.append(speech_N, np.zeros(SECONDS * RATE)), SECONDS * RATE)

    def heard() -> np.ndarray:
        """The recording, with noise that no other has: what was encoded before is put back."""
        return (speech_N + rng.normal(0, 1e-4, len(speech_N))).astype(np.float32)

    ways: dict[str, Callable[[], object]] = {"written": lambda: f"{rng.integers(10**6)}: {WRITTEN}"}
    if recording is not None:
        ways = {"spoken": lambda: [Audio.of(heard(), rate=RATE)],
                "spoken, decoded": lambda: [Recording(data=heard().tobytes(), rate=RATE)]}
    taken = {name: [first_token_ms(engine, request()) for _ in range(rounds + 1)]
             for name, request in ways.items()}
    return {**{f"{name}, ms": round(statistics.median(each[1:]), 1)
               for name, each in taken.items()},
            "first, ms": round(max(each[0] for each in taken.values()), 1),
            "peak_bytes": peak_bytes()}


def apart(*arguments: object) -> dict[str, float]:
    """Measure in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path, help="the bundle of the same tier without senses")
    parser.add_argument("recording", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=("text", "both"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(
            measured(given.text, None, given.rounds) if given.only == "text"
            else measured(given.bundle, given.recording, given.rounds)))
        return
    text, both = (apart(*sys.argv[1:], "--only", each) for each in ("text", "both"))
    print(json.dumps({
        "seconds": SECONDS, "cores": CORES, "rounds": given.rounds, "text": text,
        "multimodal": both, "above_text_bytes": both["peak_bytes"] - text["peak_bytes"]}, indent=1))


if __name__ == "__main__":
    main()
