"""The recordings that the reference encoder of sound learns from, kept in a folder.

    python -m cloister.reference.utterances --cache DIR --kokoro VOICES --workers 2

    DIR/utterances.jsonl     what is said, by whom and how; a line each
    DIR/NAME.wav             16 kHz, 16 bits; named by a hash of engine, voice, settings and text

The plan is made once, and what is there is not made again: a stopped run goes on from there. One
part is trained on, the other (`measure`) has other sentences and voices.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import soundfile

from cloister import records
from cloister.corpus import Example, normalized
from cloister.errors import DataError, SettingError
from cloister.evaluate import transcript
from cloister.files import disk_errors, whole_file
from cloister.progress import silent
from cloister.reference import console, orders, speech
from cloister.reference.augment import Augmenter
from cloister.reference.mixture import Mixture
from cloister.reference.speech import Engine
from cloister.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from rich.console import Console

    from cloister.progress import Progress

__all__ = ["PLAN", "Utterance", "length", "main", "plan", "present", "read_plan",
           "recorded", "samples", "synthesize", "write_plan"]

PLAN = "utterances.jsonl"
_SHARES = {Engine.ESPEAK: 0.55, Engine.FLITE: 0.25, Engine.FESTIVAL: 0.2}  # but for Kokoro
_CHUNK = 20  # lines that a worker says at a time
_MEASURED = 0.04  # utterances to measure with, of those to train on
_KOKORO_MEASURED = 0.3  # of these by Kokoro
_LONGEST = 30  # words
_SHORTEST = 3  # words of a sentence: an engine may say nothing of an "ow"


class Utterance(records.Record, frozen=True):
    """One recording: what it asks for, and how it is said."""

    part: Literal["train", "measure"]
    task: str
    text: str  # as the text tiers read it
    target: str  # the call that it becomes, of a sentence nothing
    said: str
    engine: Engine
    voice: str
    rate: float
    pitch: float

    def __repr__(self) -> str:
        return f"Utterance({self.file!r})"

    @property
    def file(self) -> str:
        """The name of its file."""
        how = f"{self.engine}\n{self.voice}\n{self.rate}\n{self.pitch}\n{self.said}"
        return hashlib.sha256(how.encode()).hexdigest()[:20] + ".wav"

    @property
    def words(self) -> str:
        """What is heard, in lower case."""
        return transcript.words(self.said)


def plan(data: Path, count: int, kokoro: int, *, seed: int) -> list[Utterance]:
    """Return `count` utterances to train on, and some to measure with; the same ones each time.

    To train on: a quarter are orders, half requests of SNIPS that the text tiers learn from, the
    other half of these with names of one another; a quarter are sentences of the other data sets,
    for their words. To measure: half orders, half requests held out from the tiers. `kokoro` of
    those to train on are by that engine.

    Raises:
        DataError: a data set is not in the folder `data`, or malformed.
    """
    rng = random.Random(f"utterances {seed}")
    mixture = Mixture.read(data)
    augmenter = Augmenter(mixture.calls)
    sources = {"train": [
        orders.generate(count, seed=seed), _said(mixture.calls, rng),
        _said(_sentences(mixture), rng),
        (augmenter.call(each, rng) for each in _said(mixture.calls, rng)),
    ], "measure": [orders.generate(count, seed=seed + 1), _said(mixture.held_out["call"], rng)]}
    trained = {normalized(example.input) for example in orders.generate(count, seed=seed)}
    planned: list[Utterance] = []
    for part, number, best in (
        ("train", count, kokoro),
        ("measure", round(count * _MEASURED), round(count * _MEASURED * _KOKORO_MEASURED)),
    ):
        engines = [Engine.KOKORO] * min(best, number)
        engines += rng.choices(list(_SHARES), list(_SHARES.values()), k=number - len(engines))
        rng.shuffle(engines)
        for place, engine in enumerate(engines):
            source = sources[part][place % len(sources[part])]
            example = next(each for each in source if _sayable(each.input) and (
                part == "train" or normalized(each.input) not in trained))
            planned.append(_utterance(part, example, engine, rng))
    return planned


def write_plan(folder: Path, planned: Iterable[Utterance]) -> None:
    """Write what is to be said to `folder`.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`.
    """
    with whole_file(folder / PLAN) as file:
        for each in planned:
            file.write(msgspec.json.encode(each) + b"\n")


def read_plan(folder: Path) -> list[Utterance]:
    """Read what is to be said.

    Raises:
        DataError: the plan is missing or malformed.
    """
    def refuse(why: str) -> DataError:
        return DataError(f"{PLAN} of {folder.name} cannot be used ({why}); write it again.")

    try:
        raw = (folder / PLAN).read_bytes()
    except OSError:
        raise DataError(
            f"{folder.name} has no {PLAN}; make it with python -m cloister.reference.utterances."
        ) from None
    return records.decode_lines(raw, Utterance, limit_bytes=1 << 16, refuse=refuse)


def present(folder: Path, planned: Iterable[Utterance]) -> list[Utterance]:
    """Return the utterances that are there, in the order of the plan."""
    there = {path.name for path in folder.glob("*.wav")}
    return [each for each in planned if each.file in there]


def recorded(folder: Path, part: Literal["train", "measure"]) -> list[Utterance]:
    """Return the utterances of a part that are in `folder`.

    Raises:
        DataError: the plan is missing or malformed.
    """
    return [each for each in present(folder, read_plan(folder)) if each.part == part]


def samples(folder: Path, utterance: Utterance) -> NDArray[np.float32]:
    """Read a recording, float32[N] at 16 kHz.

    Raises:
        DataError: it is missing or malformed.
    """
    try:
        samples, rate = soundfile.read(folder / utterance.file, dtype="float32")
    except (soundfile.LibsndfileError, OSError):
        rate = 0
    if rate != speech.RATE:
        raise _unreadable(utterance)
    return np.asarray(samples, np.float32)


def length(folder: Path, utterance: Utterance) -> int:
    """Return the number of samples of a recording.

    Raises:
        DataError: it is missing or malformed.
    """
    try:
        return int(soundfile.info(folder / utterance.file).frames)
    except (soundfile.LibsndfileError, OSError):
        raise _unreadable(utterance) from None


def synthesize(
    folder: Path, planned: Sequence[Utterance], *, kokoro: Path | None = None, workers: int = 1,
    progress: Progress = silent,
) -> None:
    """Say what is planned and not there yet, the quick engines first.

    Raises:
        SettingError: an engine is not installed, or `workers` is below 1.
        DataError: an engine failed.
        NotEnoughDisk, OutputUnwritable: see `cloister.files.disk_errors`.
    """
    if workers < 1:
        raise SettingError(f"workers is {workers}; it must be at least 1.")
    there = {each.file for each in present(folder, planned)}
    missing = list({each.file: each for each in planned if each.file not in there}.values())
    chunks: list[list[Utterance]] = []
    for engine in Engine:
        mine = [each for each in missing if each.engine is engine]
        if mine:
            speech.check(engine, kokoro)
        chunks += [mine[at:at + _CHUNK] for at in range(0, len(mine), _CHUNK)]
    done = len(planned) - len(missing)
    progress("speech", done, len(planned))
    with ProcessPoolExecutor(workers) as pool:
        waiting = [pool.submit(_say, folder, chunk, kokoro) for chunk in chunks]
        try:
            for each, chunk in zip(waiting, chunks, strict=True):
                each.result()
                done += len(chunk)
                progress("speech", done, len(planned), chunk[0].engine)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _unreadable(utterance: Utterance) -> DataError:
    return DataError(f"{utterance.file} cannot be read; delete it and make it again.")


def _say(folder: Path, chunk: Sequence[Utterance], kokoro: Path | None) -> None:
    lines_ = [speech.Line(voice=each.voice, text=each.said, rate=each.rate, pitch=each.pitch)
              for each in chunk]
    for each, sound in zip(
        chunk, speech.speak(chunk[0].engine, lines_, kokoro=kokoro), strict=True
    ):
        with whole_file(folder / each.file) as file:
            soundfile.write(file, sound, speech.RATE, format="WAV", subtype="PCM_16")


def _utterance(part: str, example: Example, engine: Engine, rng: random.Random) -> Utterance:
    voices = speech.training_voices() if part == "train" else speech.never_heard_voices()
    voice = rng.choice(voices[engine])
    if engine is Engine.KOKORO and part == "train" and rng.random() < 0.6:
        british = voice.startswith("b")
        voice += "+" + rng.choice(
            [each for each in voices[engine] if each.startswith("b") == british])
    written = transcript.said(example.input)
    assert written is not None
    return Utterance(
        part="train" if part == "train" else "measure", task=example.task, text=example.input,
        target=example.target, said=written, engine=engine, voice=voice,
        rate=round(rng.uniform(0.8, 1.25), 2),
        pitch=round(rng.uniform(0.75, 1.3), 2) if engine in (Engine.ESPEAK, Engine.FLITE) else 1.0)


def _said(examples: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    """Yield the examples again and again, each time in another order."""
    while True:
        yield from rng.sample(examples, len(examples))


def _sentences(mixture: Mixture) -> list[Example]:
    """Return the sentences of tales, and requests to other assistants."""
    texts = [each.input for each in mixture.intents]
    for tale in mixture.tales:
        texts += re.split(r"(?<=[.!?])\s+", f"{tale.input} {tale.target}")
    return [Example(task="sentence", input=text, target="") for text in dict.fromkeys(texts)
            if len(text.split()) >= _SHORTEST]


def _sayable(text: str) -> bool:
    said = transcript.said(text)
    return said is not None and len(said.split()) <= _LONGEST


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.utterances",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--cache", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=24_000, help="to train on (%(default)s)")
    parser.add_argument("--by-kokoro", type=int, default=2_000, help="of these (%(default)s)")
    parser.add_argument("--kokoro", type=Path, help="folder voices of npm's kokoro-js")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return console.run(_utterances, parser.parse_args(arguments))


def _utterances(given: argparse.Namespace, screen: Console) -> None:
    data = console.data(given)
    with disk_errors(given.cache.name):
        given.cache.mkdir(parents=True, exist_ok=True)
    if not (given.cache / PLAN).exists():
        write_plan(given.cache, plan(data, given.count, given.by_kokoro, seed=given.seed))
    planned = read_plan(given.cache)
    synthesize(given.cache, planned, kokoro=given.kokoro, workers=given.workers,
               progress=console.lines(screen))


if __name__ == "__main__":
    sys.exit(main())
