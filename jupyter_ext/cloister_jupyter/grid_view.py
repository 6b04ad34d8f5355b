"""What the page of the grid is told of rows: cut to a cell, in full, and side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloister.errors import CloisterError
from cloister_jupyter import baseline
from cloister_jupyter.grid import fold
from cloister_jupyter.rates import compared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cloister_jupyter.grid import Grid, Row
    from cloister_jupyter.kept import Answer

__all__ = ["comparison", "cut", "full", "short"]

_CUT = 240  # characters of a cell that are shown in a row
_LONG = 200_000  # of a text that is shown in full
_SAID = 3  # distinct answers in a row
_FLIPS = 200  # rows of a comparison


def short(grid: Grid, row: Row, variables: Sequence[str]) -> dict[str, Any]:
    """Return what a row of the table shows."""
    case = grid.plan.cases[row.case]
    return {
        "prompt": row.prompt, "case": row.case, "line": case.line,
        "values": [cut(case.values.get(name, "")) for name in variables],
        "expected": cut(case.expected or ""),
        "tiers": {name: _cell(row, name) for name in row.answers}}


def full(grid: Grid, row: Row) -> dict[str, Any]:
    """Return a row with every distinct answer."""
    case = grid.plan.cases[row.case]
    tiers = {}
    for name, answers in row.answers.items():
        whole = [each for each in answers if not each.error]
        tiers[name] = [
            _told(text, [each for each in whole if each.text.strip() == text])
            for text, _ in fold(answers)] + [
            _told("", [each]) for each in answers if each.error]
    return {
        "prompt": row.prompt, "case": row.case, "line": case.line,
        "asked": cut(grid.plan.prompt((row.prompt, row.case, None)), _LONG),
        "expected": cut(case.expected or "", _LONG), "check": cut(case.check or "", _LONG),
        "tiers": tiers}


def comparison(
    grid: Grid, before: str, after: str, *, task: str, paths: Mapping[str, Path],
) -> dict[str, Any]:
    """Return what flips between two tiers, each row beside the line of their receipts on it."""
    flips, complaint = grid.flips(before, after), ""
    receipts: list[tuple[str, str, str]] = []
    try:
        receipts = baseline.side_by_side(paths[before], paths[after])
    except CloisterError as error:
        complaint = str(error)
    values = {name: pair for name, *pair in receipts}
    rows = [*(("broken", after, row) for row in flips.broken),
            *(("mended", before, row) for row in flips.mended)]

    def told(kind: str, failing: str, row: Row) -> dict[str, Any]:
        speaks = baseline.speaks_of(values, task, _fields(row.answers[failing]))
        return {
            "kind": kind, "prompt": row.prompt, "case": row.case,
            "line": grid.plan.cases[row.case].line, "why": _why(row.answers[failing]),
            "said": [cut(fold(row.answers[name])[0][0]) if fold(row.answers[name]) else ""
                     for name in (before, after)],
            "receipt": speaks, "values": values.get(speaks, ())}

    return {
        "before": before, "after": after, "receipts": receipts, "complaint": complaint,
        "words": compared(before, after, len(flips.broken), len(flips.mended), flips.n),
        "rows": [told(*row) for row in rows[:_FLIPS]], "left": max(0, len(rows) - _FLIPS)}


def _cell(row: Row, name: str) -> dict[str, Any]:
    answers = row.answers[name]
    said = fold(answers)
    return {
        "passed": row.passed(name), "why": _why(answers),
        "said": [[cut(text), count] for text, count in said[:_SAID]],
        "more": max(0, len(said) - _SAID)}


def cut(text: str, most: int = _CUT) -> str:
    """Return a text, or its beginning and a sign that there is more."""
    return text if len(text) <= most else f"{text[:most]}\u2026"


def _why(answers: Sequence[Answer]) -> str:
    """Return why the first of the answers that do not pass does not."""
    for each in answers:
        if each.error:
            return each.error
        if each.outcome is not None and not each.outcome.passed:
            return each.outcome.why
    return ""


def _fields(answers: Sequence[Answer]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(
        field for each in answers if each.outcome is not None for field in each.outcome.fields))


def _told(text: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return an answer in full, with what the first of those who say it took."""
    first = answers[0]
    return {
        "text": cut(text, _LONG), "count": len(answers), "error": first.error,
        "seeds": [each.place[2] for each in answers if each.place[2] is not None],
        "passed": first.outcome.passed if first.outcome else None, "why": _why(answers),
        "fields": first.outcome.fields if first.outcome else (), "finish": first.finish,
        "tokens": first.tokens, "ttft_s": first.ttft_s, "kept": first.kept,
        "tokens_per_s": first.decode_tokens_per_s, "peak_rss_bytes": first.peak_rss_bytes}
