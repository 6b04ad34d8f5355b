"""What may be personal data in texts: found by the task `redact` of shipped tiers, and by its form.

The tiers learnt from sentences, so texts are cut into those; what is no sentence, a value of JSON
or a line of a few words, is put into one. What two tiers find is taken together.
"""

from __future__ import annotations

import difflib
import re
from contextlib import closing
from typing import TYPE_CHECKING

from cloister import family
from cloister.audit.notebook import personal_values
from cloister.progress import silent
from cloister.reference.redaction import LABELS
from cloister.runtime.client import Worker
from cloister_jupyter.redaction import Redaction, Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from threading import Event

    from cloister.progress import Progress

__all__ = ["MISSES", "TIERS", "found", "pieces", "propose", "spans"]

TIERS = ("pro", "nano-2")
MISSES = (
    "The redact tiers are small. In 500 sentences of tales and requests that they never saw, Pro "
    "and Nano-2 together found 96 of 100 names, addresses, dates and numbers put into them; most "
    "that they miss are names without capitals, or in odd places. Read each text yourself.")
"""Measured as `tests/unit/jupyter/test_redaction.py` does it, on the family's development data."""

_PIECE_BYTES = 240  # the longest that is asked at once
_TOGETHER = 3  # sentences that are asked at once
_SHORT = 3  # words up to which a piece is no sentence
_CARRIER = "book it for "  # the sentence that it is put into
_TOKENS = 300
_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[DJMS][rst]\.)(?<!\bMrs\.)\s+|\s*[\r\n]+\s*")
_JSON = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')  # with a colon it is the name of a field
_LABEL = re.compile(rf"\[({'|'.join(LABELS)})\]")
_WORDS = re.compile(rf"\[(?:{'|'.join(LABELS)})\]|\w+|\s+|[^\w\s]")
_PARTICLES = {"bin", "del", "den", "der", "dos", "van", "von"}
# What the tier takes for a name where it has lost its way, and would be replaced in every text.
_NO_NAMES = {
    "a", "ah", "am", "an", "and", "are", "as", "at", "be", "but", "by", "can", "come", "came",
    "could", "did", "do", "for", "from", "go", "had", "has", "have", "he", "her", "him", "his",
    "how", "i", "if", "in", "is", "it", "its", "me", "my", "no", "not", "now", "of", "oh", "on",
    "or", "our", "said", "say", "says", "see", "she", "so", "that", "the", "their", "them",
    "then", "there", "they", "this", "to", "up", "was", "we", "well", "were", "what", "when",
    "where", "which", "who", "why", "with", "would", "yes", "you", "your",
}

Span = tuple[int, int, str]
"""Start, end and label."""
_Reading = tuple[list[Span], bool]
"""What a tier finds in a piece, and whether it repeated the rest of it."""


def propose(
    texts: Sequence[str], *, tiers: Sequence[str] = TIERS, progress: Progress = silent,
    stopping: Event | None = None,
) -> Redaction | None:
    """Return the values that may be personal data in some texts; None where it was stopped.

    Raises:
        WorkerError, BundleError: a tier cannot be asked.
    """
    read = found(texts, tiers=tiers, progress=progress, stopping=stopping)
    if read is None:
        return None
    redaction = Redaction()
    for text, (spans_, sure) in read.items():
        for kind, values in personal_values(text).items():
            for each in sorted(values, key=text.index):
                redaction.add(Value(text=each, label=kind.upper(), by="form"))
        for start, end, label in spans_:
            _add(redaction, text[start:end], label)
        if not sure:
            redaction.unsure.add(text)
    return redaction


def found(
    texts: Sequence[str], *, tiers: Sequence[str] = TIERS, progress: Progress = silent,
    stopping: Event | None = None,
) -> dict[str, _Reading] | None:
    """Return what the tiers find in each text, and whether they repeated the rest of it."""
    asked = {text[start:end]: list[_Reading]() for text in texts for start, end in pieces(text)}
    for tier in tiers:
        with Worker(family.bundle(tier), vault=False) as worker:
            for done, (piece, answers) in enumerate(asked.items()):
                if stopping is not None and stopping.is_set():
                    return None
                progress(f"redact, {tier}", done, len(asked))
                answers.append(_ask(worker, piece))
    read = {}
    for text in dict.fromkeys(texts):
        places = [(start, text[start:end]) for start, end in pieces(text)]
        read[text] = [(start + first, start + last, label) for start, piece in places
                      for first, last, label in _together(piece, asked[piece])], all(
            exact for _, piece in places for _, exact in asked[piece])
    return read


def pieces(text: str) -> Iterator[tuple[int, int]]:
    """Yield the parts of a text that are asked about: sentences, lines, values of JSON."""
    if text.lstrip()[:1] in ("{", "["):
        parts = [match.span(1) for match in _JSON.finditer(text) if not match[2]]
    else:
        parts = _sentences(text)
    for start, end in parts:
        while len(text[start:end].encode()) > _PIECE_BYTES:
            most = start + len(text[start:end].encode()[:_PIECE_BYTES].decode(errors="ignore"))
            cut = text.rfind(" ", start + 1, most) + 1 or most
            yield start, cut
            start = cut
        if any(map(str.isalnum, text[start:end])):
            yield start, end


def _sentences(text: str) -> list[tuple[int, int]]:
    """Return where sentences stand, up to `_TOGETHER` of a line in one."""
    parts: list[tuple[int, int]] = []
    start, count = 0, 0
    for match in [*_END.finditer(text), None]:
        end, after = match.span() if match else (len(text), len(text))
        near = parts and "\n" not in text[parts[-1][1]:start] and count < _TOGETHER
        if near and len(text[parts[-1][0]:end].encode()) <= _PIECE_BYTES:
            parts[-1], count = (parts[-1][0], end), count + 1
        else:
            parts.append((start, end))
            count = 1
        start = after
    return parts


def spans(source: str, redacted: str) -> tuple[list[Span], bool]:
    """Return what labels in `redacted` stand for in `source`, and whether all else is as it was."""
    plain, labels = _LABEL.split(redacted)[::2], _LABEL.findall(redacted)
    if len(labels) < 20 and (match := re.fullmatch(
            "(.+?)".join(map(re.escape, plain)), source, re.DOTALL)):
        return [(*match.span(number), label) for number, label in enumerate(labels, start=1)], True
    before, after = (_WORDS.findall(text) for text in (source, redacted))
    places = [0]
    for word in before:
        places.append(places[-1] + len(word))
    found = []
    for kind, start, end, first, last in difflib.SequenceMatcher(
            None, before, after, autojunk=False).get_opcodes():
        said = _LABEL.search("".join(after[first:last])) if kind == "replace" else None
        if said:
            found.append((places[start], places[end], said[1]))
    return found, False


def _ask(worker: Worker, piece: str) -> _Reading:
    before = _CARRIER if len(piece.split()) <= _SHORT else ""
    with closing(worker.session(system="redact")) as chat:
        said = "".join(token.text for token in chat.stream(before + piece, max_tokens=_TOKENS))
    found, exact = spans(before + piece, said)
    return [(max(0, start - len(before)), end - len(before), label)
            for start, end, label in found if end > len(before)], exact


def _together(piece: str, answers: Sequence[_Reading]) -> list[Span]:
    """Return the spans of several answers as one each where they overlap, whole words all."""
    merged: list[Span] = []
    for start, end, label in sorted(
            _whole_words(piece, span) for found, _ in answers for span in found):
        if merged and start < merged[-1][1]:
            first, last, earlier = merged[-1]
            merged[-1] = first, max(last, end), label if end - start > last - first else earlier
        else:
            merged.append((start, end, label))
    return merged


def _whole_words(piece: str, span: Span) -> Span:
    start, end, label = span
    while start > 0 and re.match(r"[\w'\u2019-]", piece[start - 1]):
        start -= 1
    while re.match(r"\w|['\u2019-](?!s\b)\w", piece[end:end + 3]):
        end += 1
    return start, end, label


def _add(redaction: Redaction, found: str, label: str) -> None:
    text = found.strip(" ,;:'\"")
    words = re.findall(r"\w[\w'\u2019]*", text)
    if sum(map(str.isalnum, text)) < 2 or _NO_NAMES.issuperset(map(str.lower, words)):
        return
    if _LABEL.search(text):  # what is read was an answer of `redact`
        return
    redaction.add(Value(text=text, label=label, by="tier"))
    if label == "NAME" and len(words) > 1:
        for word in words:
            if len(word) > 2 and word[0].isupper() and word.lower() not in _PARTICLES | _NO_NAMES:
                redaction.add(
                    Value(text=word, label=label, by="tier", part_of=text, capital=True))
