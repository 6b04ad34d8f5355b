"""Free fonts that lines of text are drawn in: where each comes from, its licence, and a split.

`python -m cloister.reference.fonts DIR` fetches the families of fonts.json with `npm pack`, which
checks each package against the registry's digest, and keeps their Latin faces:

    DIR/FAMILY/LICENSE
    DIR/FAMILY/FAMILY-latin-WEIGHT-STYLE.woff2

A family that is held out is never trained on, nor is a relative: families of one designer's system,
or drawn after one another, are of one `group`, and a group is on one side. No torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import ImageFont
from rich.console import Console

from cloister.errors import CloisterError, DataError, SettingError
from cloister.files import disk_errors, whole_file
from cloister.progress import silent
from cloister.records import Label, Record, build
from cloister.reference.console import lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.progress import Progress

__all__ = ["Face", "Family", "Kind", "faces", "families", "fetch", "main"]

_STYLES = ("400-normal", "700-normal", "400-italic", "500-normal", "300-normal", "600-normal")
_MOST = 3  # faces of a family
_SIZE = 22  # pixels of the em that glyphs are looked for at
_LIMIT_BYTES = 64 << 20  # of a package's file
_OPEN = 2048  # sizes of faces that stay open, 0.12 MB each; opening one takes a millisecond


class Kind(StrEnum):
    """What a family is like."""

    SANS = "sans"
    SERIF = "serif"
    MONO = "mono"  # as receipts and typewriters print
    DOTS = "dots"  # pixels and dot matrices
    HAND = "hand"
    DISPLAY = "display"


class Family(Record, frozen=True):
    """A family of fonts and the npm package that has it."""

    name: Label
    package: Label
    version: Label
    licence: Label  # SPDX
    kind: Kind
    group: Label  # of relatives
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class Face:
    """One weight and style of a family, in a file."""

    family: Family
    path: Path
    _missing: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Open the face with an em of `size` pixels; the last few sizes stay open.

        Raises:
            DataError: the file is no font.
        """
        return _OPENED.open(self.path, size)

    def draws(self, text: str) -> bool:
        """Whether the face has a glyph for every character of `text`."""
        for character in set(text) - {" "} - self._missing.keys():
            font = self.at(_SIZE)
            mask = font.getmask(character)
            nothing = font.getmask("\uffff")  # what stands in for a missing glyph
            self._missing[character] = mask.getbbox() is None or (
                mask.size == nothing.size and bytes(mask) == bytes(nothing))
        return not any(self._missing.get(character, False) for character in text)


class _Opened:
    """Open faces, the least recently used closed first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._fonts: OrderedDict[tuple[Path, int], ImageFont.FreeTypeFont] = OrderedDict()

    def open(self, path: Path, size: int) -> ImageFont.FreeTypeFont:
        font = self._fonts.pop((path, size), None)
        if font is None:
            try:
                font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
            except OSError:
                raise DataError(
                    f"Font {path.name} cannot be read; remove its folder and fetch it again."
                ) from None
        self._fonts[path, size] = font
        while len(self._fonts) > self._most:
            self._fonts.popitem(last=False)
        return font


_OPENED = _Opened(_OPEN)


@cache
def families(*, held_out: bool | None = None) -> tuple[Family, ...]:
    """Return the families of fonts.json, or those on one side of the split."""
    text = resources.files("cloister.reference").joinpath("fonts.json").read_text("utf-8")
    read = build(json.loads(text), list[Family], refuse=DataError)
    return tuple(each for each in read if held_out in (None, each.held_out))


def faces(folder: Path, *, held_out: bool) -> list[Face]:
    """Return the faces in `folder` of the families on one side of the split, by name.

    Raises:
        DataError: a family has not been fetched.
    """
    found = []
    for family in families(held_out=held_out):
        paths = [folder / family.name / f"{family.name}-latin-{style}.woff2" for style in _STYLES]
        paths = [path for path in paths if path.is_file()][:_MOST]
        if not paths:
            raise DataError(
                f"Font {family.name} is not in {folder.name}; fetch it with "
                "`python -m cloister.reference.fonts DIR`.")
        found += [Face(family=family, path=path) for path in paths]
    return found


def fetch(folder: Path, *, progress: Progress = silent) -> None:
    """Fetch into `folder` what is not there of every family.

    Raises:
        SettingError: there is no npm.
        DataError: a package cannot be fetched, or holds no Latin face.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SettingError("Fonts come as npm packages, and there is no npm; install Node.js.")
    for number, family in enumerate(families()):
        if not (folder / family.name).is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as name:
                _unpack(_packed(npm, family, Path(name)), family, Path(name) / "new")
                (Path(name) / "new").rename(folder / family.name)
        progress("fonts", number + 1, len(families()))


def _packed(npm: str, family: Family, folder: Path) -> Path:
    done = subprocess.run(
        [npm, "pack", "--silent", f"{family.package}@{family.version}"], cwd=folder,
        capture_output=True, check=False)
    packed = next(folder.glob("*.tgz"), None)
    if done.returncode or packed is None:
        raise DataError(
            f"Package {family.package} {family.version} cannot be fetched; see that npm reaches "
            "its registry.")
    return packed


def _unpack(packed: Path, family: Family, folder: Path) -> None:
    """Copy licence and faces out of a package; names of folders in it count for nothing."""
    wanted = {f"{family.name}-latin-{style}.woff2" for style in _STYLES} | {"LICENSE"}
    folder.mkdir()
    with tarfile.open(packed) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if name in wanted and member.isfile() and member.size <= _LIMIT_BYTES:
                content = archive.extractfile(member)
                assert content is not None
                with whole_file(folder / name) as file:
                    shutil.copyfileobj(content, file)
    if not any(folder.glob("*.woff2")):
        raise DataError(f"Package {family.package} {family.version} holds no Latin face.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m cloister.reference.fonts", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where fonts are kept")
    given = parser.parse_args(arguments)
    screen = Console(stderr=True)
    try:
        with disk_errors(given.folder.name):
            given.folder.mkdir(parents=True, exist_ok=True)
            fetch(given.folder, progress=lines(screen))
    except CloisterError as error:
        screen.print(str(error), style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
