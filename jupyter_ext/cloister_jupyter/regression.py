"""A case that was looked at becomes a line of a regression file.

`cloister eval --data` and `cloister export --gate-data` read the file as it is. It holds prompts
and answers in plain text: it is written where its user says, and only for their eyes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cloister import corpus
from cloister.errors import DataError, InvalidText
from cloister.evaluate import tasks
from cloister.example import Example
from cloister.files import whole_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["promote"]


def promote(path: Path, *, prompt: str, answer: str, system: str | None = None) -> bool:
    """Add a prompt with the answer that is wanted; False where the file has just that.

    One with another answer is replaced: of two that differ, one would always fail. The system
    prompt is the task that scores are counted by; `cloister.evaluate.tasks` says which.

    Raises:
        DataError: the prompt or the answer is empty; the file's name does not end with .jsonl, or
            what is in it is no data to measure on; or the task wants another form of answer.
        InvalidText: a text is not Unicode.
        OutputUnwritable, NotEnoughDisk: the file cannot be written; it is as it was.
    """
    if path.suffix != ".jsonl":
        raise DataError(f"Regression file {path.name} is read by its ending; end it with .jsonl.")
    if not prompt.strip() or not answer.strip():
        raise DataError("A case needs a prompt and the answer that is wanted; give both.")
    example = Example(task=system or "", input=prompt, target=answer)
    try:
        "".join((example.task, prompt, answer)).encode()
    except UnicodeEncodeError:
        raise InvalidText("A case holds half a character; correct it first.") from None
    tasks.check([example])
    kept = corpus.read(path) if path.exists() and path.stat().st_size else []
    if any((each.messages, each.target) == (example.messages, answer) for each in kept):
        return False
    rest = [each for each in kept if each.messages != example.messages]
    # Nothing replaced: lines stay as they are, with whatever else their records hold.
    lines = path.read_bytes().splitlines() if kept and len(rest) == len(kept) else []
    if not lines or not all(map(_is_record, lines)):
        lines = [_line(each) for each in rest]
    with whole_file(path, private=True) as file:
        for line in (*lines, _line(example)):
            file.write(line + b"\n")
    return True


def _line(example: Example) -> bytes:
    return json.dumps(example.to_dict(), ensure_ascii=False).encode()


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
