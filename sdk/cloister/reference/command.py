"""What the command lines of the two trainings of encoders share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloister.files import disk_errors
from cloister.model.device import device
from cloister.reference import checkpoint_path, console, ctc
from cloister.settings import Settings
from cloister.tiers import Tier
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from cloister.reference.ctc import CtcModel

__all__ = ["add_arguments", "count", "model", "positive", "run", "tokenizer"]


def add_arguments(parser: argparse.ArgumentParser, *, minutes: float, peak: float) -> None:
    """Add the arguments that both have."""
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER",
                        help="of a checkpoint (default: that of the shipped family)")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=minutes,
                        help="of the processor, or of a GPU by the clock (default: %(default)s)")
    parser.add_argument("--peak", type=float, default=peak,
                        help="learning rate; lower with --begin (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=Path, metavar="OUT",
                        help="train further what was made there")
    console.add_mean(parser)
    parser.add_argument("--no-measure", action="store_false", dest="measure",
                        help="measure nothing: what measures is a command of its own")


def count(text: str) -> int:
    """Read a whole number from 0."""
    return _at_least(text, 0)


def positive(text: str) -> int:
    """Read a whole number from 1."""
    return _at_least(text, 1)


def _at_least(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
    return number


def tokenizer(given: argparse.Namespace) -> Tokenizer:
    """Read the tokenizer that is named, or that of the shipped family.

    Raises:
        TokenizerError: it cannot be read.
    """
    folder: Path = given.tokenizer or checkpoint_path(Tier.PRO)
    return Tokenizer.from_files(folder / "tokenizer.json", folder / "chat_template.jinja")


def model(given: argparse.Namespace, new: Callable[[], CtcModel]) -> tuple[CtcModel, str]:
    """Return the model to begin from, on the device, and what it is: "" of a new one.

    Raises:
        CheckpointError, TrainingError: that of `--begin` cannot be read.
        SettingError: `--mean` without it.
    """
    console.mean(given)
    if given.begin is None:
        return new().to(device()), ""
    return ctc.load(given.begin).to(device()), ctc.identity(given.begin)


def run(train: Callable[[argparse.Namespace, Console], None], given: argparse.Namespace) -> int:
    """Make the folder of the run and train; see `console.run`."""
    def work(given: argparse.Namespace, screen: Console) -> None:
        torch.set_num_threads(1)
        with disk_errors(given.out.name):
            given.out.mkdir(parents=True, exist_ok=True)
        train(given, screen)

    return console.run(work, given)
