"""Written requests as they are said: numbers in words, and nothing but words and pauses."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["LETTERS", "said", "words"]

LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
"""The characters of what `words` returns."""

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
         "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
         "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
             "nine": "ninth", "twelve": "twelfth"}
_SIGNS = {"&": " and ", "+": " plus ", "%": " percent", "@": " at ", "\u2019": "'", "\u2018": "'",
          "-": " ", "\u2013": " ", "\u2014": ", ", "/": " ", ":": ", ", ";": ", ", '"': "",
          "\u201c": "", "\u201d": "", "(": ", ", ")": ", "}
_NUMBER = re.compile(r"(\d+)(st|nd|rd|th|s)?", re.IGNORECASE)
_SAYABLE = re.compile(r"[A-Za-z' ,.?!]*[A-Za-z][A-Za-z' ,.?!]*")


def said(text: str) -> str | None:
    """Return `text` as letters, apostrophes, spaces and `,.?!`; None where that is not certain.

    Accents are dropped. Years and clock times are read as such; sums, decimals and long numbers
    are not read at all.
    """
    if re.search(r"\d[.,]\d|[$\u20ac\u00a3#*=<>_]|\d{5,}|\b0\d", text.replace(":0", ":")):
        return None
    text = re.sub(r"\b(\d{1,2}):(\d\d)\b", _clock, text)
    for sign, words_ in _SIGNS.items():
        text = text.replace(sign, words_)
    text = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    text = _NUMBER.sub(lambda found: f" {_number(found)} ", text)
    text = " ".join(re.sub(r"\s+([,.?!])", r"\1", text).split())
    return text if _SAYABLE.fullmatch(text) else None


def words(text: str) -> str:
    """Return what is heard of `said`: words in lower case, a space between them."""
    letters = re.sub(r"[^a-z' ]", " ", text.lower())
    return " ".join(word for each in letters.split() if (word := each.strip("'")))


def _clock(found: re.Match[str]) -> str:
    hour, minute = int(found[1]), int(found[2])
    if minute == 0:
        return f"{_cardinal(hour)} o'clock"
    return f"{_cardinal(hour)} {'oh ' if minute < 10 else ''}{_cardinal(minute)}"


def _number(found: re.Match[str]) -> str:
    number, ending = int(found[1]), (found[2] or "").lower()
    if len(found[1]) == 4 and 1100 <= number < 2100 and not 2000 <= number < 2010:
        century, rest = divmod(number, 100)
        text = f"{_cardinal(century)} " + (
            "hundred" if rest == 0 else
            f"oh {_cardinal(rest)}" if rest < 10 else _cardinal(rest))
    else:
        text = _cardinal(number)
    if not ending:
        return text
    if ending == "s":
        return f"{text[:-1]}ies" if text.endswith("y") else f"{text}s"
    first, _, last = text.rpartition(" ")
    last = _ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return f"{first} {last}".strip()


def _cardinal(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    much, rest = divmod(number, unit)
    return f"{_cardinal(much)} {name}" + (f" {_cardinal(rest)}" if rest else "")
