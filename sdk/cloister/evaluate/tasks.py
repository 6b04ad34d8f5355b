"""Scores of a model's answers by task, from the texts alone.

| task | scores |
|---|---|
| `call`, `order` | `frame_exact`, `frame_said`, `intent_accuracy`, `slot_f1` |
| `intent` | `intent_accuracy` (of what is in scope), `oos_recall` |
| `read` | `exact`, `cer` and `wer`, the share of characters and of words to be corrected |
| any other | `exact` |

`frame_said` compares the values of a call as they are said, in words without case or punctuation:
of a recording nobody knows whether a name has capitals, or a number is written in digits.

A tool call that is no JSON is a wrong answer, never an error. Of a picture or a recording a slot is
right by its name and value, since nobody says at which place of it the value stands.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from cloister.errors import DataError, SettingError
from cloister.evaluate.transcript import said, words
from cloister.example import NONE
from cloister.runtime.tools import tool_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloister.corpus import Example

__all__ = ["Score", "check", "correct", "flips", "resampled_error", "scores", "spans"]

_FRAMES = ("call", "order")  # tasks whose answer is a tool call with slots
_CALLS = (*_FRAMES, "intent")
_RESAMPLES = 200
_T = TypeVar("_T")

Span = tuple[str, int, int]
"""A slot, and the begin and end of its value in the request."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share of `n` things counted, or bits a byte of `n` texts."""

    value: float
    error: float  # standard error
    n: int

    @classmethod
    def of(cls, hits: Sequence[bool]) -> Score:
        """Return the share of hits."""
        n = len(hits)
        value = sum(hits) / n
        return cls(value=value, error=(value * (1 - value) / n) ** 0.5, n=n)


def check(examples: Sequence[Example]) -> None:
    """Raise DataError, by place, unless every target that should be a tool call is one."""
    for number, example in enumerate(examples, start=1):
        if example.task in _CALLS and _call(example.target) is None:
            raise DataError(
                f"The target of {example.place or f'example {number}'} of task {example.task} is "
                'no tool call, {"name": ..., "arguments": {...}} with strings; correct it or name '
                "the task otherwise."
            )


def scores(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Score]:
    """Return every score of `examples`, all of one task, and of the texts they were answered with.

    `check` lets the examples through.
    """
    task = examples[0].task
    right = correct(examples, answers)
    if task in _FRAMES:
        calls = [(_call(answer), _target(example))
                 for example, answer in zip(examples, answers, strict=True)]
        return {
            "frame_exact": Score.of(right),
            "frame_said": Score.of([
                call is not None and _said(call) == _said(target) for call, target in calls]),
            "intent_accuracy": Score.of([
                call is not None and call[0] == target[0] for call, target in calls]),
            "slot_f1": _slot_f1(examples, answers),
        }
    if task == "intent":
        inside = [_target(example)[0] != NONE for example in examples]
        parts = {
            "intent_accuracy": [hit for hit, scope in zip(right, inside, strict=True) if scope],
            "oos_recall": [hit for hit, scope in zip(right, inside, strict=True) if not scope],
        }
        return {name: Score.of(hits) for name, hits in parts.items() if hits}
    if task == "read":
        return {"exact": Score.of(right), **_corrections(examples, answers)}
    return {"exact": Score.of(right)}


def correct(examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
    """Return whether each answer is right: the same call, name and arguments, or the same text."""
    return [
        _call(answer) == _target(example) if example.task in _CALLS
        else answer.strip() == example.target.strip()
        for example, answer in zip(examples, answers, strict=True)
    ]


def flips(before: Sequence[bool], after: Sequence[bool]) -> Score:
    """Return the share of answers that became right or wrong (arXiv 2407.09141)."""
    return Score.of([one != other for one, other in zip(before, after, strict=True)])


def spans(request: str, arguments: dict[str, list[str]]) -> list[Span]:
    """Return the span of each value: its first occurrence that no earlier value has taken.

    A value that stands nowhere is given a place of its own outside the request: it counts as
    predicted, and is never right.
    """
    taken: list[Span] = []
    outside = -1
    for slot, values in arguments.items():
        for value in values:
            start = request.find(value)
            while start >= 0 and any(
                start < end and begin < start + len(value) for _, begin, end in taken
            ):
                start = request.find(value, start + 1)
            if start < 0 or not value:
                start = outside = outside - 1
                taken.append((slot, start, start))
            else:
                taken.append((slot, start, start + len(value)))
    return taken


def _slot_f1(examples: Sequence[Example], answers: Sequence[str]) -> Score:
    """Return micro F1 over spans (the CoNLL rule), its error by resampling requests."""
    rows = []
    for example, answer in zip(examples, answers, strict=True):
        wanted, call = _target(example)[1], _call(answer)
        rows.append(
            (_hits_by_value if example.files else _hits_by_place)(
                example.input, wanted, call[1] if call else {}))
    return Score(value=_f1(rows), error=resampled_error(rows, _f1), n=sum(row[1] for row in rows))


def _hits_by_place(
    request: str, wanted: dict[str, list[str]], got: dict[str, list[str]]
) -> tuple[int, int, int]:
    """Return the numbers of right, wanted and given spans."""
    right, given = set(spans(request, wanted)), set(spans(request, got))
    return len({span for span in right & given if span[1] >= 0}), len(right), len(given)


def _hits_by_value(
    _: str, wanted: dict[str, list[str]], got: dict[str, list[str]]
) -> tuple[int, int, int]:
    """Return the numbers of right, wanted and given values."""
    right, given = (
        Counter((slot, value) for slot, values in slots.items() for value in values)
        for slots in (wanted, got))
    return (right & given).total(), right.total(), given.total()


def _corrections(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Score]:
    """Return the share of characters and words that are inserted, deleted or replaced."""
    if find_spec("jiwer") is None:
        raise SettingError('Error rates need jiwer; run pip install "cloister[media]".')
    import jiwer

    found = {}
    for name, process in (("cer", jiwer.process_characters), ("wer", jiwer.process_words)):
        rows = []
        for example, answer in zip(examples, answers, strict=True):
            out = process(example.target.strip(), answer.strip())
            wrong = out.substitutions + out.deletions + out.insertions
            rows.append((wrong, out.hits + out.substitutions + out.deletions))
        found[name] = Score(
            value=_share(rows), error=resampled_error(rows, _share), n=sum(row[1] for row in rows))
    return found


def _share(rows: Sequence[tuple[int, int]]) -> float:
    wrong, of = (sum(column) for column in zip(*rows, strict=True))
    return wrong / of if of else 0.0


def resampled_error(rows: Sequence[_T], value: Callable[[Sequence[_T]], float]) -> float:
    """Return the standard error of `value` by the bootstrap, 200 resamples of `rows`."""
    rng = random.Random(0)
    return statistics.stdev(value(rng.choices(rows, k=len(rows))) for _ in range(_RESAMPLES))


def _f1(rows: Sequence[tuple[int, int, int]]) -> float:
    hits, wanted, got = (sum(column) for column in zip(*rows, strict=True))
    return 2 * hits / (wanted + got) if wanted + got else 1.0


Call = tuple[str, dict[str, list[str]]]
"""Name and arguments of a tool call; every argument a list."""


def _call(text: str) -> Call | None:
    """Parse the one tool call that `text` is, all its arguments texts; None if it is none."""
    calls = tool_calls(text)
    if len(calls) != 1:
        return None
    lists = dict[str, list[str]]()
    for slot, value in calls[0].arguments.items():
        values = value if isinstance(value, list) else [value]
        lists[slot] = [text for text in values if isinstance(text, str)]
        if len(lists[slot]) != len(values):
            return None
    return calls[0].name, lists


def _said(call: Call) -> Call:
    """Return a call with its values in words."""
    name, arguments = call
    return name, {
        slot: [words(said(value) or value) for value in values]
        for slot, values in arguments.items()}


def _target(example: Example) -> Call:
    call = _call(example.target)
    assert call is not None, "see check()"
    return call
