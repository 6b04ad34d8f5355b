"""Training of the encoder of sound, on letters and on the tokens of the family.

    python -m cloister.reference.utterances --cache DIR --kokoro VOICES
    python -m cloister.reference.listener --cache DIR --minutes 120 -o OUT

    OUT/utterances.jsonl    what is trained on: what the cache held when the run began

With `--encoder` it begins from one that is trained, as `cloister import` reads Whisper's, whose
first layers stay as they are with `--frozen`.

See trainer.py for what else OUT holds. Scores are of voices never heard, and of people, whose
recordings are only measured with.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cloister.errors import DataError, SettingError
from cloister.evaluate.transcript import LETTERS
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import MelShape
from cloister.model.sense import SenseConfig
from cloister.model.sense_file import SenseFile
from cloister.reference import acoustics, command, console, hearing, trainer, utterances
from cloister.reference.ctc import CtcModel
from cloister.reference.speech import RATE, Engine
from cloister.reference.trainer import TrainerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from rich.console import Console

    from cloister.reference.utterances import Utterance
    from cloister.tokenizer import Tokenizer

__all__ = ["Recordings", "config", "main"]

_POOL = 32  # batches whose recordings are sorted by length together
_NATURAL = 0.3  # share of a pass that is Kokoro's, the most natural, as far as
_REPEATED = 8  # times that each of its recordings may come in one
_SPEEDS = np.linspace(0.85, 1.2, 15)
_EASY = 40_000  # recordings that a run begins with, with little silence


def config() -> SenseConfig:
    """Return the reference family's encoder of sound: 25 positions a second, at most 16 seconds."""
    shape = EncoderShape(
        stem=Stem.CONVOLUTIONS_2D, rows=80, positions=400, hidden_size=192, layers=5, heads=4,
        feed_forward=512, halvings=2, width=32, kernel=15)
    return SenseConfig(encoder=shape, mel=MelShape(bins=shape.rows))


class Recordings:
    """Recordings in a folder, each time with another room, noise and microphone.

    All are held on the device, 32 kB a second.

    Raises:
        DataError: there are none, or one cannot be read.
    """

    def __init__(
        self, cache: Path, data: Sequence[Utterance], tokenizer: Tokenizer, config: SenseConfig, *,
        rows: int = 8, seed: int = 0, device: torch.device | None = None,
    ) -> None:
        if not data:
            raise DataError("There are no recordings to train on; make them first.")
        self.seconds = 0.0  # of other processes, which there are none of
        self._words = [each.words for each in data]
        self._tokens = [tokenizer.encode(each.text) for each in data]
        self._rows, self._seed, self._config = rows, seed, config
        digest = hashlib.sha256("\n".join(each.file for each in data).encode())
        self.identity: object = [rows, seed, digest.hexdigest()]
        samples = [
            (utterances.samples(cache, each) * 32767).astype(np.int16) for each in data]
        lengths = [len(each) for each in samples]
        self._samples_N = torch.from_numpy(np.concatenate(samples)).to(device)
        self._lengths, self._starts = np.array(lengths), np.cumsum([0, *lengths[:-1]])
        natural = [row for row, each in enumerate(data) if each.engine is Engine.KOKORO]
        wanted = (len(data) - len(natural)) * _NATURAL / (1 - _NATURAL)
        times = min(_REPEATED, round(wanted / max(1, len(natural))))
        self._pass = np.array([*range(len(data)), *natural * max(0, times - 1)])

    @contextmanager
    def supply(self, first: int) -> Iterator[_Supply]:
        """Make the batches from number `first` on."""
        yield _Supply(self, first)

    def batch(self, rows: Sequence[int], number: int) -> trainer.Batch:
        """Return recordings of one length, most with seconds of silence."""
        rng = np.random.default_rng((self._seed, number))
        shape, mel = self._config.encoder, self._config.mel
        assert mel is not None
        longest = mel.hop * shape.columns
        x_BN, lengths = acoustics.at_speed(*self._speech(rows), float(rng.choice(_SPEEDS)))
        easy = number * self._rows < _EASY
        silence = rng.uniform(0.1, 1.0) if easy or rng.random() < 0.35 else rng.uniform(1.0, 6.0)
        length = max(lengths) + int(silence * RATE)
        length = min(_whole(length), longest)
        others, _ = self._speech(rng.integers(len(self._lengths), size=4))
        x_BN = acoustics.record(
            x_BN[:, :length], [min(each, length) for each in lengths], length, rng, others=others)
        return trainer.Batch(
            x=x_BN, texts=[self._words[row] for row in rows],
            tokens=[self._tokens[row] for row in rows])

    def _speech(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[torch.Tensor, list[int]]:
        """Return speech with zeros after it, float32[B, N], and its lengths."""
        lengths, device = self._lengths[rows], self._samples_N.device
        starts_B1, lengths_B1 = (
            torch.from_numpy(each[:, None]).to(device) for each in (self._starts[rows], lengths))
        at_N = torch.arange(_whole(int(lengths.max())), device=device)
        index_BN = (starts_B1 + at_N).clamp(max=len(self._samples_N) - 1)
        x_BN = self._samples_N[index_BN].float() / 32767
        return x_BN * (at_N < lengths_B1), lengths.tolist()

    def plans(self) -> Iterator[list[int]]:
        """Yield the rows of each batch, of about one length each."""
        rows, number = self._rows, 0
        while True:
            rng = np.random.default_rng((self._seed, number, 1))
            order = rng.permutation(self._pass)
            plans: list[list[int]] = []
            for at in range(0, len(order), rows * _POOL):
                pool = order[at:at + rows * _POOL]
                pool = pool[np.argsort(self._lengths[pool], kind="stable")]
                plans += [pool[begin:begin + rows].tolist() for begin in range(0, len(pool), rows)]
            rng.shuffle(plans)
            yield from plans
            number += 1


def _whole(samples: int) -> int:
    """Return whole seconds: what a GPU has to plan for each length takes longer than a step."""
    return -(-samples // RATE) * RATE


class _Supply:
    seconds = 0.0

    def __init__(self, recordings: Recordings, first: int) -> None:
        self._recordings, self._first = recordings, first

    def __iter__(self) -> Iterator[trainer.Batch]:
        plans = islice(self._recordings.plans(), self._first, None)
        for number, rows in enumerate(plans, self._first):
            yield self._recordings.batch(rows, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.listener",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True,
                        help="recordings of python -m cloister.reference.utterances")
    parser.add_argument("--rows", type=command.positive, default=8,
                        help="recordings a step (default: %(default)s)")
    parser.add_argument("--encoder", type=Path, metavar="FILE",
                        help="encoder of sound to begin from, of cloister import")
    parser.add_argument("--frozen", type=command.count, default=0, metavar="LAYERS",
                        help="layers of the encoder that are not trained, from its input on")
    command.add_arguments(parser, minutes=120, peak=5e-3)
    return command.run(_train, parser.parse_args(arguments))


def _new(given: argparse.Namespace, vocabulary: int) -> CtcModel:
    if given.encoder is None:
        return CtcModel(config(), LETTERS, vocabulary, given.seed)
    file = SenseFile.open(given.encoder)
    if file.config.mel is None or file.config.projector is not None or file.config.pieces:
        raise SettingError(
            f"{given.encoder.name} is no encoder of sound alone; name what cloister import made "
            "of a Whisper model.")
    model = CtcModel(file.config, LETTERS, vocabulary, given.seed)
    model.sense.load_state_dict(file.load().state_dict())
    return model


def _train(given: argparse.Namespace, screen: Console) -> None:
    if not (given.out / utterances.PLAN).exists():
        utterances.write_plan(given.out, utterances.recorded(given.cache, "train"))
    data, read_by = utterances.read_plan(given.out), command.tokenizer(given)
    measure = None
    if given.measure:
        measure = partial(
            hearing.measure, folder=console.data(given) / "spoken_orders", cache=given.cache)
    if given.begin is not None and given.encoder is not None:
        raise SettingError("--begin and --encoder are two beginnings; leave one of them out.")
    model, origin = command.model(given, lambda: _new(given, read_by.vocab_size))
    if given.encoder is not None:
        origin += SenseFile.open(given.encoder).identity
    if given.frozen:
        model.freeze(given.frozen)
        origin += f" {given.frozen} layers frozen"
    recordings = Recordings(
        given.cache, data, read_by, model.sense.config, rows=given.rows, seed=given.seed,
        device=model.device)
    trainer.train(
        model, recordings,
        TrainerSettings(minutes=given.minutes, peak=given.peak, decay=0.4, covered=True,
                        mean=given.mean, seed=given.seed),
        given.out, measure=measure, origin=origin, progress=console.lines(screen))


if __name__ == "__main__":
    sys.exit(main())
