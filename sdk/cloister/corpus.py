"""Data sets: which files serve a purpose, and the examples in them.

What a file or folder holds is read by `cloister.formats`. Where there are several splits, by the
names of files or of lists in them, the purpose decides, or the choice is asked for: they are never
mixed. No torch.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.errors import DataError, OverlapError, SettingError
from cloister.example import Example, tool_call
from cloister.formats import DataFile, Flaw, Split, is_data

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

__all__ = ["LEARN", "MEASURE", "TOLERATED", "Corpus", "Example", "Flaw", "Purpose", "Selection",
           "Split", "load", "normalized", "overlap", "read", "refuse_overlap", "select", "split",
           "tool_call"]

TOLERATED = 0.05  # share of the records of a training set
_NAMED = 5  # files or flaws in a sentence
_WHY = {
    "malformed": 'it is in none of the formats, SNIPS, CLINC150, FairytaleQA, "messages", '
                 '"conversations", "instruction" with "output", or "task", "input", "target"; or a '
                 "message has no text, another role than system, user or assistant, or is a system "
                 "message after the first",
    "empty": "a request or an answer is missing",
    "with tools": "calls of tools are not read",
    "with reasoning": "reasoning is read only within an answer, as the model's template writes it",
    "without its file": "a picture or recording is not there, or outside the folder of the data",
    "weighted": "an answer is learnt whole or not at all, with a weight of 1 or 0",
}

Purpose = tuple[Split, ...]
"""The splits that serve it, the first that there is."""

LEARN: Purpose = (Split.TRAIN,)
MEASURE: Purpose = (Split.TEST, Split.VALIDATE)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a file or folder is read, and what is left out of it and why."""

    name: str
    split: Split | None  # where names say one
    files: tuple[str, ...]
    left_out: dict[str, str]
    _sources: tuple[tuple[DataFile, frozenset[str] | None], ...] = field(repr=False)

    def __str__(self) -> str:
        read = _listed(self.files) + (f" (split {self.split})" if self.split else "")
        left = [f"{name} ({why})" for name, why in self.left_out.items()]
        return f"{read}; left out: {_listed(left)}" if left else read

    def to_dict(self) -> dict[str, object]:
        """Return the selection, JSON-ready."""
        return {"files": list(self.files), "split": self.split, "left_out": self.left_out}

    def records(self, *, answered: bool = True) -> Iterator[Example | Flaw]:
        """Yield the examples and flaws, by order of file names.

        A request without an answer is a flaw where all should be `answered`.

        Raises:
            DataError: a file cannot be read.
        """
        for file, lists in self._sources:
            for record in file.examples(lists):
                if answered and isinstance(record, Example) and not record.target.strip():
                    yield _flaw(record, "empty")
                else:
                    yield record

    def nothing(self) -> DataError:
        """Return the error that there are no examples."""
        left = f" (left out: {_listed(list(self.left_out))})" if self.left_out else ""
        return DataError(
            f"{self.name} holds no examples{left}; name a data file or a directory of them.")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The usable examples of a data set, and the flaws of the rest."""

    examples: tuple[Example, ...]
    flaws: tuple[Flaw, ...]

    def count(self) -> dict[str, int]:
        """Return the number of flaws of each kind."""
        return dict(Counter(flaw.kind for flaw in self.flaws))


def select(
    path: str | Path, purpose: Purpose, split: Split | None = None, *, choice: bool = True
) -> Selection:
    """Choose what to read in `path`, a file or a folder, for `purpose`, or of one `split`.

    Of a folder every file with an ending of data, but not what is there a second time. Where there
    are several splits, that of the purpose; files of no split then count only beside lists. Unless
    there is a `choice`, an error does not ask for `--split`.

    Raises:
        DataError: there are several splits and none for the purpose, or not the one asked for; or
            a file cannot be read.
    """
    path = Path(path)
    names, left_out = _candidates(path)
    files = [DataFile(path / name if path.is_dir() else path) for name in names]
    present = {each for file in files for each in file.splits}
    order = purpose if split is None else (split,)
    chosen = next((each for each in order if each in present), None)
    if chosen is None and (split is not None or len(present) > 1):
        raise _undecided(path.name, files, split, choice=choice)
    together = split is None and not any(file.splits - {None} and not file.lists for file in files)
    sources: list[tuple[DataFile, frozenset[str] | None]] = []
    for file in files:
        lists = frozenset(name for name, each in file.lists.items() if each == chosen)
        if len(present) == 1 or file.splits == {chosen} or (together and file.splits == {None}):
            sources.append((file, None))
        elif lists:
            sources.append((file, lists))
            left_out |= {
                f"{file.name}: {name}": each or "another list"
                for name, each in file.lists.items() if name not in lists}
        else:
            left_out[file.name] = ", ".join(
                sorted(each or "no split in its name" for each in file.splits))
    if len(present) == 1:
        chosen = next(iter(present))
    return Selection(
        name=path.name, split=chosen, files=tuple(file.name for file, _ in sources),
        left_out=left_out, _sources=tuple(sources))


def read(data: str | Path | Selection, *, split: Split | None = None) -> list[Example]:
    """Read every example to measure on, of a selection or of what `select` chooses in a path.

    Nothing is left out, repeated records included: scores count what the data set counts.

    Raises:
        DataError: see `select`; nothing to read, or a malformed or empty record, named by file and
            number.
    """
    examples = []
    selection = data if isinstance(data, Selection) else select(data, MEASURE, split)
    for record in selection.records():
        if isinstance(record, Example):
            examples.append(record)
        elif record.kind != "blank":
            raise DataError(
                f"Record {record.number} of {record.file} is {record.kind}: {_WHY[record.kind]}; "
                "correct it or leave it out.")
    if not examples:
        raise selection.nothing()
    return examples


def load(
    data: str | Path | Selection, *, split: Split | None = None, tolerated: float = TOLERATED,
    answered: bool = True,
) -> Corpus:
    """Read the examples to train on, but malformed, empty, blank and repeated records.

    Unless `answered`, also requests without an answer, with an empty target.

    Raises:
        DataError: see `select`; nothing to read, or more than `tolerated`, a share, had to be left
            out.
        SettingError: `tolerated` is no share.
    """
    if not 0 <= tolerated <= 1:
        raise SettingError(f"tolerate is {tolerated}; it must lie between 0 and 1.")
    examples: dict[Example, None] = {}
    flaws = []
    selection = data if isinstance(data, Selection) else select(data, LEARN, split)
    for record in selection.records(answered=answered):
        if isinstance(record, Flaw):
            flaws.append(record)
        elif record in examples:
            flaws.append(_flaw(record, "duplicate"))
        else:
            examples[record] = None
    if not examples and not flaws:
        raise selection.nothing()
    corpus = Corpus(examples=tuple(examples), flaws=tuple(flaws))
    if len(flaws) > tolerated * (len(flaws) + len(examples)):
        kinds = ", ".join(f"{count} {kind}" for kind, count in corpus.count().items())
        places = ", ".join(map(str, flaws[:_NAMED]))
        why = "".join(f" {kind.capitalize()}: {_WHY[kind]}." for kind in corpus.count()
                      if kind in _WHY)
        raise DataError(
            f"Of {len(flaws) + len(examples)} records {len(flaws)} cannot be used ({kinds}; first "
            f"{places}), more than the {tolerated:.0%} tolerated; correct them or raise the bound."
            f"{why}")
    return corpus


def split(
    examples: Iterable[Example], *, held_out: float = 0.05, seed: int | None = None
) -> tuple[list[Example], list[Example]]:
    """Return training and development parts, the same ones each time, and others by another seed.

    Neither inputs that normalise alike nor the turns of a conversation ever straddle them. What is
    held out is also held out as part of a larger share.
    """
    salt = "" if seed is None else f"{seed} "
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256((salt + normalized(_opening(example))).encode()).digest()
        number = int.from_bytes(digest[:4], "big")
        parts[number < held_out * 2**32].append(example)
    return parts


def normalized(text: str) -> str:
    """Return `text` without case, punctuation and repeated spaces, letters in one spelling.

    What is all punctuation or symbols stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(
        sign if sign == "_" or unicodedata.category(sign)[0] in "LMN" else " " for sign in folded)
    return " ".join((words if words.strip() else folded).split())


def overlap(training: Iterable[Example], evaluation: Iterable[Example]) -> int:
    """Count what is asked in evaluation and, normalised, in the training data of the same task."""
    seen = {_asked(example) for example in training}
    return sum(_asked(example) in seen for example in evaluation)


def refuse_overlap(training: Iterable[Example], evaluation: Collection[Example]) -> None:
    """Raise OverlapError if evaluation inputs occur in the training data."""
    shared = overlap(training, evaluation)
    if shared:
        raise OverlapError(
            f"{shared} of {len(evaluation)} evaluation requests occur in the training data; "
            "remove them there, or pass --allow-overlap and do not report the scores."
        )


def _flaw(example: Example, kind: str) -> Flaw:
    file, _, number = example.place.rpartition(":")
    return Flaw(file=file, number=int(number), kind=kind)


def _opening(example: Example) -> str:
    """Return the first request of a conversation."""
    return next((each.text for each in example.turns if each.role == "user"), example.input)


def _asked(example: Example) -> tuple[str, ...]:
    """Return what an answer is given to, without its spelling."""
    texts = [turn.text for turn in example.turns] or [example.input]
    return (example.task, *map(normalized, texts), *(path.name for _, path in example.files))


def _candidates(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of the data files at `path`, and of what is none or a second time there."""
    if not path.is_dir():
        return [path.name], {}
    try:
        found = {each.name: each for each in sorted(path.iterdir()) if each.name[0] != "."}
    except OSError as error:
        raise DataError(
            f"Folder {path.name} cannot be read ({error.strerror}); check its permissions."
        ) from None
    names, left_out = [], {}
    for name, each in found.items():
        stem, dot, ending = name.partition(".")
        whole = f"{stem}_full{dot}{ending}"  # SNIPS has the same requests in both
        unpacked = name[:-3] if name.casefold().endswith(".gz") else name
        if not each.is_file():  # a pipe would be waited for
            left_out[name] = "a folder" if each.is_dir() else "no regular file"
        elif not is_data(name):
            left_out[name] = "no data file"
        elif whole in found:
            left_out[name] = f"also in {whole}"
        elif unpacked != name and unpacked in found:
            left_out[name] = f"also in {unpacked}"
        else:
            names.append(name)
    return names, left_out


def _undecided(
    name: str, files: Iterable[DataFile], split: Split | None, *, choice: bool
) -> DataError:
    by_split: dict[Split | None, list[str]] = {}
    for file in files:
        for each in file.splits:
            by_split.setdefault(each, []).append(file.name)
    there = "; ".join(
        f"{each or 'no split'}: {_listed(names)}" for each, names in sorted(
            by_split.items(), key=lambda item: item[0] or ""))
    if split is not None:
        return DataError(f"{name} has no split {split} ({there}); name another, or a file.")
    options = " or ".join(f"--split {each}" for each in Split if each in by_split)
    chosen = f"choose one with {options}, or name a file" if choice else "name a file of one"
    return DataError(f"{name} holds several splits ({there}); {chosen}.")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
