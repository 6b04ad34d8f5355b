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
    if example in kept:
        return False
    rows = [each for each in kept if (each.task, each.input) != (example.task, prompt)
            or each.turns]
    with whole_file(path, private=True) as file:
        for each in (*rows, example):
            file.write(json.dumps(each.to_dict(), ensure_ascii=False).encode() + b"\n")
    return True
