"""Values that are replaced in texts: each the same way wherever it stands.

A value is found in any letters, with any spaces, accents or invisible signs; a number also with
other signs between its digits. One of fewer than `LONG` signs is found as a whole word only. It is
replaced by a placeholder of its own, such as `[NAME 1]`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from cloister.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LONG", "MOST_VALUES", "Found", "Redaction", "Value"]

LONG = 8  # signs from which a value is found within a word, too
MOST_VALUES = 2000
_NUMBERS = ("PHONE", "CARD", "ACCOUNT")
_BETWEEN = r"[ ().\-/]{0,3}"  # signs of a number


@dataclass(frozen=True, kw_only=True)
class Value:
    """What is replaced. Its repr does not show it."""

    text: str = field(repr=False)
    label: str
    by: str  # who named it: tier, form or you
    part_of: str = field(default="", repr=False)  # a name, whose placeholder it shares
    capital: bool = False  # found only where it begins with a capital: a part that may be a word


@dataclass(frozen=True, kw_only=True)
class Found:
    """A place in a text where a value stands."""

    start: int
    end: int
    value: int  # its number


class Redaction:
    """The values to replace, each on or off."""

    def __init__(self, values: Iterable[Value] = ()) -> None:
        self.values: list[Value] = []
        self.off: set[int] = set()
        self.unsure: set[str] = set()
        """Texts that the tier did not repeat, so that what it found there is little sure."""
        self._numbers: dict[str, int] = {}  # by what is looked for
        self._patterns: list[re.Pattern[str]] | None = None
        for value in values:
            self.add(value)

    def __repr__(self) -> str:
        return f"Redaction({len(self.on)} of {len(self.values)} values)"

    @property
    def on(self) -> list[int]:
        """The numbers of the values that are replaced."""
        return [number for number in range(len(self.values)) if number not in self.off]

    def add(self, value: Value) -> int:
        """Take a value in, on; return its number, that of an equal one where there is one.

        Raises:
            SettingError: it has no letter and no digit, or there are MOST_VALUES.
        """
        key = _key(value)
        if not any(map(str.isalnum, key)):
            raise SettingError("What is to be replaced has no letter and no digit; choose more.")
        number = self._numbers.setdefault(key, len(self.values))
        if number == MOST_VALUES:
            del self._numbers[key]
            raise SettingError(
                f"There are {MOST_VALUES:,} values to replace; export fewer rows at a time.")
        if number == len(self.values):
            self.values.append(value)
        elif self.values[number].capital and not value.capital:
            self.values[number] = replace(value, part_of=self.values[number].part_of)
        self.switch(number, on=True)
        return number

    def switch(self, number: int, *, on: bool) -> None:
        """Replace a value, or leave it; with a name its parts.

        Raises:
            SettingError: there is no such value.
        """
        if not 0 <= number < len(self.values):
            raise SettingError("There is no such value; look for them anew.")
        parts = {place for place, value in enumerate(self.values)
                 if value.capital and value.part_of == self.values[number].text}
        (self.off.difference_update if on else self.off.update)(parts | {number})
        self._patterns = None

    def placeholder(self, number: int) -> str:
        """Return what stands for a value: for a part of a name, what stands for the name."""
        value = self.values[number]
        if value.part_of:
            return self.placeholder(self._numbers[folded(value.part_of)[0].strip()])
        place = sum(each.label == value.label and (not each.part_of or each is value)
                    for each in self.values[:number + 1])
        return f"[{value.label} {place}]"

    def find(self, text: str) -> list[Found]:
        """Return where values that are on stand in a text, in order; none overlaps another."""
        if self._patterns is None:
            self._patterns = self._compiled()
        signs, at = folded(text)
        hits = []
        for pattern in self._patterns:
            for match in pattern.finditer(signs):
                number = self._numbers.get(match[1])
                if number is None:
                    number = self._numbers[_signs(match[1])]
                start, end = at[match.start(1)], at[match.end(1) - 1] + 1
                while end < len(text) and not _folded_sign(text[end]):
                    end += 1  # accents and invisible signs of the last one
                if not self.values[number].capital or text[start].upper() == text[start]:
                    hits.append(Found(start=start, end=end, value=number))
        found: list[Found] = []
        for hit in sorted(hits, key=lambda hit: (hit.start, -hit.end)):
            if found and hit.start < found[-1].end:  # what two cover is replaced as one
                last = found[-1]
                longer = max(last, hit, key=lambda each: each.end - each.start)
                found[-1] = Found(
                    start=last.start, end=max(last.end, hit.end), value=longer.value)
            else:
                found.append(hit)
        return found

    def redact(self, text: str) -> str:
        """Return a text with a placeholder for each value."""
        parts, end = [], 0
        for hit in self.find(text):
            parts += [text[end:hit.start], self.placeholder(hit.value)]
            end = hit.end
        return "".join((*parts, text[end:]))

    def _compiled(self) -> list[re.Pattern[str]]:
        """Return what finds the values in folded texts: words, and numbers."""
        kinds: dict[bool, list[str]] = {False: [], True: []}
        for key, number in self._numbers.items():
            if number not in self.off:
                kinds[self.values[number].label in _NUMBERS].append(key)
        patterns = []
        for is_number, keys in kinds.items():
            keys.sort(key=lambda key: (key[0], -len(key)))  # at each place the longest
            groups = [  # of one first sign, so that most places need one look for each
                f"(?={re.escape(first)})(?:{'|'.join(_pattern(key, is_number) for key in group)})"
                for first, group in groupby(keys, key=lambda key: key[0])]
            if groups:
                plus = r"\+?" if is_number else ""
                patterns.append(re.compile(f"(?=({plus}(?:{'|'.join(groups)})))"))
        return patterns


def _pattern(key: str, is_number: bool) -> str:
    pattern = (_BETWEEN if is_number else "").join(map(re.escape, key))
    if len(key) >= LONG:
        return pattern
    # Scripts without capitals join words with others.
    before = r"(?<![^\W_])" if _bounded(key[0]) else ""
    return before + pattern + (r"(?![^\W_])" if _bounded(key[-1]) else "")


def _bounded(sign: str) -> bool:
    return sign.isdigit() or sign.lower() != sign.upper()


def folded(text: str) -> tuple[str, list[int]]:
    """Return a text without capitals, accents and invisible signs, one space for each space.

    With each sign comes the place in `text` that it stands for.
    """
    signs, at = list[str](), list[int]()
    for place, sign in enumerate(text):
        for each in _folded_sign(sign):
            if each != " " or not signs or signs[-1] != " ":
                signs.append(each)
                at.append(place)
    return "".join(signs), at


# Signs that are typed one for the other.
_ALIKE = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u2032\u00b4`"), "'"),
    **dict.fromkeys(map(ord, "\u2010\u2012\u2013\u2014\u2212"), "-")}


@lru_cache(maxsize=4096)
def _folded_sign(sign: str) -> str:
    if sign.isspace():
        return " "
    parts = unicodedata.normalize("NFKD", sign.translate(_ALIKE)).casefold().translate(_ALIKE)
    return "".join(
        part for part in unicodedata.normalize("NFKD", parts)
        if unicodedata.category(part) not in ("Mn", "Me", "Cf", "Cc"))


def _signs(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def _key(value: Value) -> str:
    text = folded(value.text)[0].strip()
    return _signs(text) if value.label in _NUMBERS else text
