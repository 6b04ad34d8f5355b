"""Texts to draw as lines: requests, personal data, receipts, tales, and characters at random.

A text is one line of at most `LONGEST` characters of `ALPHABET`; where a receipt has columns, more
spaces than one are between them, and `label` has one. Sentences of data sets are those of their
training parts, or for evaluation those that are held out (see mixture.py).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cloister.reference import word_lists

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

__all__ = ["ALPHABET", "LONGEST", "Texts", "clean", "label", "receipt", "wrapped"]

ALPHABET = "".join(map(chr, range(32, 127))) + "£€°ÄÉÖÜßàáâäçèéêëíïñóôöúü"
LONGEST = 64  # characters of a line

_TYPED = str.maketrans({  # quotation marks and dashes that typesetters use
    "\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
_OUTSIDE = re.compile(f"[^{re.escape(ALPHABET)}]")
_PLACE = re.compile(r"\{(\w+)\}")
_LITERAL = {"hash": "#", "star": "*"}  # which in the grammar stand for digits
_LINE_OF_NOTE = (16, 44)  # characters at most, drawn for each note


def clean(text: str) -> str:
    """Return `text` as it is drawn: on one line, typographic marks as typed, others left out."""
    return _OUTSIDE.sub("", " ".join(text.translate(_TYPED).split()))


def label(text: str) -> str:
    """Return what is to be read of `text`: the width of a gap is not."""
    return " ".join(text.split())


def wrapped(text: str, longest: int = LONGEST) -> list[str]:
    """Break `text` at spaces into lines of at most `longest` characters; cut longer words."""
    lines: list[str] = []
    for given in text.split(" "):
        word = given
        if lines and len(lines[-1]) + 1 + len(word) <= longest:
            lines[-1] += " " + word
            continue
        while len(word) > longest:
            lines.append(word[:longest])
            word = word[longest:]
        lines.append(word)
    return lines


def receipt(rng: random.Random, symbol: str = "line") -> str:
    """Draw a line of a receipt from the grammar of receipts.json.

    A symbol in capitals is that symbol in capitals; # is a digit, * one from 1.
    """
    if symbol in _LITERAL:
        return _LITERAL[symbol]
    grammar = word_lists("receipts")
    if symbol not in grammar:
        return receipt(rng, symbol.lower()).upper()
    parts = _PLACE.split(rng.choice(grammar[symbol]))
    return "".join(
        receipt(rng, part) if place % 2 else _digits(part, rng) for place, part in enumerate(parts))


def _digits(pattern: str, rng: random.Random) -> str:
    return "".join(
        str(rng.randrange(10)) if c == "#" else str(rng.randint(1, 9)) if c == "*" else c
        for c in pattern)


class Texts:
    """A source of lines and notes, parts of whole texts.

    `requests`, `personal` and `sentences` are drawn about as often as each other.
    """

    def __init__(
        self, requests: Sequence[str], personal: Sequence[str], sentences: Sequence[str],
    ) -> None:
        self._texts = [
            [text for text in map(clean, texts) if text]
            for texts in (requests, personal, sentences)]

    def line(self, rng: random.Random, longest: int = LONGEST) -> str:
        """Draw a line of at most `longest` characters."""
        draw = rng.random()
        if draw < 0.25:
            text = receipt(rng)
            if len(text) > longest:
                text = rng.choice(wrapped(text, longest)).strip()
        elif draw < 0.4:
            text = _scrambled(rng, rng.randint(1, longest))
        else:
            text = self._part(self._text(rng), rng, longest)
        draw = rng.random()
        if draw < 0.08:
            text = text.upper()
        elif draw < 0.11:
            text = text.title()
        return _OUTSIDE.sub("", text)[:longest].strip() or "-"

    def note(self, rng: random.Random, most: int = 4) -> list[str]:
        """Draw a note of two to `most` lines."""
        longest = rng.randint(*_LINE_OF_NOTE)
        lines = [each for each in wrapped(self._text(rng), longest) if each]
        count = rng.randint(2, most)
        while len(lines) < count:
            lines.append(self.line(rng, longest))
        return lines[:count]

    def _text(self, rng: random.Random) -> str:
        return rng.choice(rng.choice([texts for texts in self._texts if texts]))

    def _part(self, text: str, rng: random.Random, longest: int) -> str:
        """Return whole words in a row, most often as many as a line holds."""
        if rng.random() < 0.3:
            longest = rng.randint(min(8, longest), longest)
        words = text.split(" ")
        start = 0
        if len(text) > longest and rng.random() < 0.7:
            start = rng.randrange(len(words))
        return wrapped(" ".join(words[start:]), longest)[0]


def _scrambled(rng: random.Random, length: int) -> str:
    """Draw words of characters that are all about as likely, so that rare ones are learnt."""
    alphabet = ALPHABET.replace(" ", "")
    kinds = (alphabet, alphabet, "0123456789", "0123456789.,-/:$£€", alphabet[:94],
             "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHKLMNP0123456789")
    words: list[str] = []
    while sum(map(len, words)) + len(words) < length:
        word = "".join(rng.choices(rng.choice(kinds), k=rng.randint(1, 9)))
        words.append(word.capitalize() if rng.random() < 0.2 else word)
    return " ".join(words)[:length]
