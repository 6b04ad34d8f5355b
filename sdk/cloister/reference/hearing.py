"""How well a model hears: word error rate, and orders understood by the words alone.

An order is what `orders.frame` makes of the words that were heard, so a slot can be right though a
letter was not. Recordings of people are measured whole, and with the silence around them cut off.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import jiwer
import numpy as np
import soundfile
import torch

from cloister.corpus import read, tool_call
from cloister.errors import DataError
from cloister.evaluate.tasks import scores
from cloister.reference import acoustics, orders, utterances
from cloister.reference.speech import RATE, Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from cloister.example import Example
    from cloister.reference.ctc import CtcModel
    from cloister.reference.utterances import Utterance

__all__ = ["longest", "measure", "people", "scored", "synthesized", "transcribe", "trimmed"]

_WINDOW = RATE // 50
_BELOW_DB = 40.0  # the loudest window: taken for silence
_MARGIN = RATE // 4  # samples kept before and after
_AROUND = 2 * RATE  # samples of silence around synthesized speech


def transcribe(model: CtcModel, recording_N: NDArray[np.float32]) -> str:
    """Return the words heard in a recording at 16 kHz.

    Raises:
        DataError: it is longer than the model hears.
    """
    most = longest(model)
    if len(recording_N) > most:
        raise DataError(
            f"A recording lasts {len(recording_N) / RATE:.1f} s; at most {most / RATE:.1f} s "
            "are heard, so cut it.")
    stride = model.sense.config.samples_per_vector
    whole_N = np.pad(recording_N, (0, -len(recording_N) % stride))
    (text,) = model.read(torch.from_numpy(whole_N).unsqueeze(0))
    return text


def longest(model: CtcModel) -> int:
    """Return the samples of the longest recording."""
    config = model.sense.config
    return config.samples_per_vector * config.encoder.positions


def trimmed(recording_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a recording from a moment before it is loud to a moment after."""
    count = len(recording_N) // _WINDOW
    windows = recording_N[:count * _WINDOW].reshape(count, _WINDOW)
    power = np.mean(np.square(windows), axis=1, dtype=np.float64)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (-_BELOW_DB / 10))
    if not len(loud):
        return recording_N
    begin, end = loud[0] * _WINDOW - _MARGIN, (loud[-1] + 1) * _WINDOW + _MARGIN
    return recording_N[max(0, begin):end]


def measure(model: CtcModel, folder: Path, cache: Path) -> dict[str, object]:
    """Return the scores of people's orders in `folder`, and of voices never heard in `cache`.

    Raises:
        DataError: recordings or labels are missing or malformed.
    """
    model.eval()
    return scored(partial(transcribe, model), folder, cache, longest(model))


def scored(
    hear: Callable[[NDArray[np.float32]], str], folder: Path, cache: Path, most: int
) -> dict[str, object]:
    """Return the scores of any that hears words in a recording of at most `most` samples.

    Raises:
        DataError: recordings or labels are missing or malformed.
    """
    measured = utterances.recorded(cache, "measure")
    return {
        "people": people(hear, folder, trim=False),
        "people, trimmed": people(hear, folder, trim=True),
        "voices never heard": synthesized(hear, cache, measured, most),
    }


def people(
    hear: Callable[[NDArray[np.float32]], str], folder: Path, *, trim: bool
) -> dict[str, float]:
    """Return the scores of the orders that people spoke, as `order` is scored.

    Raises:
        DataError: the recordings or their labels are missing or malformed.
    """
    examples = read(folder)
    answers = []
    for example in examples:
        recording_N = _recording(example)
        heard = hear(trimmed(recording_N) if trim else recording_N)
        answers.append(tool_call(orders.INTENT, orders.frame(heard).items()))
    return {name: score.value for name, score in scores(examples, answers).items()}


def synthesized(
    hear: Callable[[NDArray[np.float32]], str], folder: Path, measured: Sequence[Utterance],
    most: int
) -> dict[str, float]:
    """Return the word error rate of utterances in `folder`, by engine, and the frames of orders.

    Each has a room, noise, a microphone and seconds of silence of its own, the same each time.
    """
    heard = []
    for number, each in enumerate(measured):
        speech_N = utterances.samples(folder, each)
        rng = np.random.default_rng(number)
        length = min(len(speech_N) + _AROUND, most)
        x_1N = acoustics.record(
            torch.from_numpy(speech_N)[None], [len(speech_N)], length, rng)
        heard.append(hear(x_1N[0].numpy()))
    groups = {f"wer {name}": [
        number for number, each in enumerate(measured) if name in ("all", each.engine, each.task)
    ] for name in ("all", *Engine, "order", "call")}
    found = {name: float(jiwer.wer(
        [measured[number].words for number in rows], [heard[number] for number in rows]))
        for name, rows in groups.items() if rows}
    right = [orders.frame(heard[number]) == json.loads(measured[number].target)["arguments"]
             for number in groups["wer order"]]
    return found | ({"frames": sum(right) / len(right)} if right else {})


def _recording(example: Example) -> NDArray[np.float32]:
    (_, path), = example.files
    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except (soundfile.LibsndfileError, OSError):
        rate = 0
    if rate != RATE or samples.ndim != 1:
        raise DataError(f"{path.name} is no recording of one channel at {RATE} Hz; leave it out.")
    return np.asarray(samples, np.float32)
