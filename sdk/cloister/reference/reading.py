"""What a reader of lines is worth: character errors, and lines and notes without one.

`python -m cloister.reference.reading --fonts FONTS OUT` measures what `reader` left in OUT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.table import Table

from cloister.errors import CloisterError
from cloister.media import note
from cloister.reference import console, ctc, fonts
from cloister.reference.batches import stacked
from cloister.reference.drawing import WIDTH, fitted
from cloister.reference.mixture import Mixture
from cloister.reference.pictures import Camera, Picture
from cloister.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cloister.reference.ctc import CtcModel

__all__ = ["confusions", "main", "notes", "samples", "scores", "table"]

_LINES = 400  # of each test
_NOTES = 200
_BATCH = 50
_WEAR = {"clean": 0.0, "half worn": 0.5, "worn": 1.0}


def samples(camera: Camera, lines: int = _LINES) -> dict[str, list[Picture]]:
    """Return lines to measure with by name, up to as worn as any that are trained on."""
    return {
        name: [camera.line(f"test {name} {line}", strength=strength) for line in range(lines)]
        for name, strength in _WEAR.items()}


def scores(
    model: CtcModel, samples: Mapping[str, Sequence[Picture]]
) -> dict[str, dict[str, float]]:
    """Return of each test the rate of character errors, and the share of lines without one.

    Pictures have the full width, as the program's have. The rate is the Levenshtein distance of
    all lines divided by the number of characters written.
    """
    found: dict[str, dict[str, float]] = {}
    for name, pictures in samples.items():
        pairs = list(zip(_read(model, pictures), (each.text for each in pictures), strict=True))
        found[name] = {"lines": len(pairs), **_errors(pairs)}
    return found


def notes(model: CtcModel, camera: Camera, count: int = _NOTES) -> dict[str, dict[str, float]]:
    """Return the same of pictures of notes, which are cut first, and the share cut rightly.

    A line break is a character, too.
    """
    found: dict[str, dict[str, float]] = {}
    for name, strength in _WEAR.items():
        pairs, right = [], 0
        for number in range(count):
            page = camera.page(f"test {name} {number}", strength=strength)
            cut = note.lines(Image.fromarray(page.pixels_HW), most=len(page.pixels_HW))
            read = _read(model, [Picture(pixels_HW=fitted(line), text="") for line in cut])
            pairs.append(("\n".join(read), "\n".join(page.texts)))
            right += len(cut) == len(page.texts)
        found[f"notes, {name}"] = {
            "lines": count, **_errors(pairs), "cut": round(right / count, 4)}
    return found


def _errors(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the errors of what was read for what is written."""
    errors = sum(Levenshtein.distance(*pair) for pair in pairs)
    return {"character_errors": round(errors / sum(len(text) for _, text in pairs), 4),
            "whole": round(sum(read == text for read, text in pairs) / len(pairs), 4)}


def confusions(
    model: CtcModel, pictures: Sequence[Picture], most: int = 20
) -> list[tuple[str, str, int]]:
    """Return the characters most often read as others: written, read, times; "" is nothing."""
    counts: Counter[tuple[str, str]] = Counter()
    for read, picture in zip(_read(model, pictures), pictures, strict=True):
        counts.update(
            (picture.text[edit.src_pos] if edit.tag != "insert" else "",
             read[edit.dest_pos] if edit.tag != "delete" else "")
            for edit in Levenshtein.editops(picture.text, read))
    return [(*pair, times) for pair, times in counts.most_common(most)]


def _read(model: CtcModel, pictures: Sequence[Picture]) -> list[str]:
    texts: list[str] = []
    for at in range(0, len(pictures), _BATCH):
        batch = stacked(list(pictures[at:at + _BATCH]), WIDTH)
        texts += model.read(torch.from_numpy(batch.x_BRW))
    return texts


def table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Return what `scores` returned as a table."""
    shown = Table("lines in fonts never seen", "number", "character errors", "without one",
                  "cut rightly")
    for name, each in scores.items():
        shown.add_row(name, f"{each['lines']}", f"{each['character_errors']:.1%}",
                      f"{each['whole']:.1%}", f"{each['cut']:.1%}" if "cut" in each else "")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(prog="python -m cloister.reference.reading",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Settings.from_environment().data,
                        help="folder of the public data sets (default: CLOISTER_DATA)")
    parser.add_argument("--fonts", type=Path, required=True,
                        help="fonts of python -m cloister.reference.fonts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("folder", type=Path, metavar="OUT", help="what the training wrote")
    given = parser.parse_args(arguments)
    try:
        camera = Camera(Mixture.read(console.data(given)).held_out_texts,
                        fonts.faces(given.fonts, held_out=True))
        model = ctc.load(given.folder)
        found = scores(model, samples(camera)) | notes(model, camera)
    except CloisterError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        return 1
    if given.json:
        print(json.dumps(found, indent=1))  # noqa: T201
    else:
        Console().print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
