"""Word error rates of the family's encoder of sound, and of others on the same recordings.

    python tests/campaigns/hearing.py --cache RECORDINGS [--whisper FOLDER] [--front OUT]

RECORDINGS is what `cloister.reference.utterances` made, FOLDER Whisper base as faster-whisper reads
it (CTranslate2's model.bin, config.json, tokenizer.json and vocabulary.txt), OUT an encoder that
`cloister.reference.listener --encoder` trained further. Orders are understood by the words and a
rule alone, without a tier. Writes its table into `hearing.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.evaluate.transcript import said, words
from cloister.reference import ctc, encoder_path, hearing
from cloister.reference.speech import RATE
from cloister.settings import Settings

HERE = Path(__file__)
HEAD = ("hears", "weights, M", "processor, s a second", "words wrong, requests",
        "words wrong, orders", "orders of voices never heard", "orders of people",
        "the same, trimmed", "slots of people", "the same, trimmed")
Hear = Callable[[NDArray[np.float32]], str]


def encoder(folder: Path) -> tuple[Hear, int, int]:
    """Return what hears by the letters of an encoder, its weights and longest recording."""
    model = ctc.load(folder)
    count = sum(each.numel() for each in model.sense.parameters())
    return partial(hearing.transcribe, model), count, hearing.longest(model)


def whisper(folder: Path) -> tuple[Hear, int, int]:
    """Return what hears as Whisper base does, numbers in words."""
    model = import_module("faster_whisper").WhisperModel(  # installed for this alone
        str(folder), device="cpu", compute_type="float32", cpu_threads=1)

    def hear(recording_N: NDArray[np.float32]) -> str:
        pieces, _ = model.transcribe(
            recording_N, language="en", beam_size=1, without_timestamps=True,
            condition_on_previous_text=False)
        text = " ".join(piece.text for piece in pieces)
        return words(said(text) or text)

    return hear, 72_600_000, 30 * RATE


def row(name: str, made: tuple[Hear, int, int], folder: Path, cache: Path) -> dict[str, Any]:
    """Return the scores of one, and how long it takes."""
    hear, weights, most = made
    heard = spent = 0.0

    def timed(recording_N: NDArray[np.float32]) -> str:
        nonlocal heard, spent
        began = time.process_time()
        text = hear(recording_N)
        spent += time.process_time() - began
        heard += len(recording_N) / RATE
        return text

    scores = hearing.scored(timed, folder, cache, most)
    return {"name": name, "weights": weights, "factor": spent / heard, **scores}


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells of the table, without its head."""
    found: list[tuple[str, ...]] = []
    for each in rows:
        voices, people, cut = (
            each[name] for name in ("voices never heard", "people", "people, trimmed"))
        found.append((
            each["name"], f"{each['weights'] / 1e6:.1f}", f"{each['factor']:.3f}",
            *(f"{100 * value:.1f} %" for value in (
                voices["wer call"], voices["wer order"], voices["frames"], people["frame_exact"],
                cut["frame_exact"], people["slot_f1"], cut["slot_f1"]))))
    return found


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--whisper", type=Path)
    parser.add_argument("--front", type=Path)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data)
    given = parser.parse_args()
    torch.set_num_threads(1)
    people, rows = given.data / "spoken_orders", []
    tried: list[tuple[str, Callable[[], tuple[Hear, int, int]]]] = [
        ("the family's", partial(encoder, encoder_path("ears")))]
    if given.front is not None:
        tried.append(("Whisper base's encoder, trained further", partial(encoder, given.front)))
    if given.whisper is not None:
        tried.append(("Whisper base, with its own decoder", partial(whisper, given.whisper)))
    for name, make in tried:
        rows.append(row(name, make(), people, given.cache))
        print(json.dumps(rows[-1]), flush=True)
    cells = table(rows)
    ruler = ("---", *("---:",) * (len(HEAD) - 1))
    lines = [" | ".join(each) for each in (HEAD, ruler, *cells)]
    command = " ".join(["python", "tests/campaigns/hearing.py", *(
        each if each.startswith("--") else shlex.quote(Path(each).name) for each in sys.argv[1:])])
    HERE.with_suffix(".md").write_text(
        "# Words heard\n\n"
        f"`{command}`, {datetime.now(UTC):%-d %B %Y}, Python {platform.python_version()}, on "
        f"{platform.system()} {platform.machine()}, one core, a busy machine\n\n"
        + "".join(f"| {line} |\n" for line in lines), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
