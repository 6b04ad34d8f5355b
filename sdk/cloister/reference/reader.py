"""Training of the encoder of lines, on characters and on how the family's tokens are spelled.

    python -m cloister.reference.fonts FONTS
    python -m cloister.reference.reader --fonts FONTS --minutes 60 -o OUT

See trainer.py for what OUT holds. Scores are of lines of held-out texts in fonts never seen.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import PixelScale
from cloister.model.sense import SenseConfig
from cloister.reference import command, console, fonts, reading, speller, trainer
from cloister.reference.batches import Lesson
from cloister.reference.batches import Supply as Drawn
from cloister.reference.ctc import CtcModel
from cloister.reference.drawing import HEIGHT, WIDTH
from cloister.reference.lines import ALPHABET
from cloister.reference.mixture import Mixture
from cloister.reference.pictures import Camera
from cloister.reference.trainer import TrainerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from cloister.tokenizer import Tokenizer

__all__ = ["Lines", "config", "main"]

_STRIDE = 4  # columns of a position
_RAMP = 20_000  # lines, see `Lesson`


def config() -> SenseConfig:
    """Return the reference family's encoder of lines: 128 positions of 4 columns.

    White is 0, so that a picture that is filled up has nothing there.
    """
    return SenseConfig(
        encoder=EncoderShape(
            stem=Stem.CONVOLUTIONS_2D, rows=HEIGHT, positions=WIDTH // _STRIDE, hidden_size=192,
            layers=4, heads=4, feed_forward=512, halvings=2, width=32, kernel=7),
        pixels=PixelScale(mean=(1.0,), deviation=(0.5,)))


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The lines of a lesson, drawn by `workers` processes; a source of batches."""

    camera: Camera
    lesson: Lesson
    tokenizer: Tokenizer
    workers: int = 0

    @property
    def identity(self) -> object:
        """What the batches hang on but the texts and the fonts."""
        return asdict(self.lesson)

    @contextmanager
    def supply(self, first: int) -> Iterator[_Written]:
        """Draw the batches from number `first` on."""
        with Drawn(self.camera, self.lesson, first, self.workers) as drawn:
            yield _Written(drawn, self, first)


class _Written:
    """Drawn batches, and as many texts with where their tokens end."""

    def __init__(self, drawn: Drawn, lines: Lines, first: int) -> None:
        self._drawn, self._lines, self._first = drawn, lines, first

    @property
    def seconds(self) -> float:
        return self._drawn.seconds

    def __iter__(self) -> Iterator[trainer.Batch]:
        tokenizer, seed = self._lines.tokenizer, self._lines.lesson.seed
        made_of = speller.parts(tokenizer)
        for number, each in enumerate(self._drawn, self._first):
            rng = random.Random(f"spelled {seed} {number}")
            spelled, tokens = [], []
            for _ in range(self._lines.lesson.rows):
                text = speller.text(self._lines.camera.texts, made_of, rng)
                bytes_, ends = speller.spaced(text.encode(), speller.ends(text, tokenizer), rng)
                spelled.append(bytes_)
                tokens.append(ends)
            yield trainer.Batch(x=torch.from_numpy(each.x_BRW), texts=each.texts, tokens=tokens,
                                spelled=spelled)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.reader",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, required=True,
                        help="fonts of python -m cloister.reference.fonts")
    parser.add_argument("--workers", type=command.count, default=1,
                        help="processes that draw lines (default: %(default)s)")
    parser.add_argument("--rows", type=command.positive, default=48,
                        help="lines a step (default: %(default)s)")
    command.add_arguments(parser, minutes=60, peak=6e-3)
    return command.run(_train, parser.parse_args(arguments))


def _train(given: argparse.Namespace, screen: Console) -> None:
    mixture, tokenizer = Mixture.read(console.data(given)), command.tokenizer(given)
    source = Lines(
        camera=Camera(mixture.texts(given.seed), fonts.faces(given.fonts, held_out=False)),
        lesson=Lesson(rows=given.rows, ramp=_RAMP, seed=given.seed), tokenizer=tokenizer,
        workers=given.workers)
    samples = reading.samples(Camera(
        mixture.held_out_texts, fonts.faces(given.fonts, held_out=True))) if given.measure else {}
    model, origin = command.model(
        given, lambda: CtcModel(
            config(), ALPHABET, tokenizer.vocab_size, given.seed,
            pieces=speller.pieces(tokenizer)))
    trainer.train(
        model, source, TrainerSettings(
            minutes=given.minutes, peak=given.peak, mean=given.mean, seed=given.seed),
        given.out, origin=origin, progress=console.lines(screen),
        measure=(lambda model: reading.scores(model, samples)) if given.measure else None)
    if given.measure:
        report = json.loads((given.out / trainer.REPORT).read_text("utf-8"))
        screen.print(reading.table({name: report[name] for name in samples}))


if __name__ == "__main__":
    sys.exit(main())
