"""Augmentation of requests: slot values swapped, casing, typos, filler words.

Every change is made to request and answer alike, so that the answer stays right.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from cloister.corpus import Example, tool_call

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

__all__ = ["Augmenter", "Piece", "pieces"]

Piece = tuple[str, str | None]
"""Text, and the slot it fills."""

# Slots of works: each may have any title. The rest of the request tells them apart.
_TITLES = ("album", "entity_name", "movie_name", "object_name", "track")
# Slots that anything may fill: a value may hold words that nobody has ever seen.
_OPEN = (*_TITLES, "artist", "city", "geographic_poi", "playlist", "poi", "restaurant_name")
# Slots whose few values mean something to the rest of the request.
_FIXED = ("best_rating", "music_item", "object_type", "object_location_type", "movie_type",
          "object_part_of_series_type", "playlist_owner", "rating_unit")
_BEFORE = ("please ", "hey, ", "ok, ", "can you ", "could you please ", "um ", "hi, ", "now ",
           "I need you to ", "I'd like you to ", "so ", "alright, ")
_AFTER = (" please", " thanks", ", thank you", " right now", ", ok?", " for me")


class Augmenter:
    """A source of variants of requests, with the slot values of other training requests."""

    def __init__(self, examples: Iterable[Example]) -> None:
        values: dict[str, dict[str, None]] = {}
        for example in examples:
            for text, slot in pieces(example) or ():
                if slot is not None and slot not in _FIXED:
                    values.setdefault(slot, {})[text] = None
        self.values = {slot: list(texts) for slot, texts in values.items()}
        self.titles = [text for slot in _TITLES for text in self.values.get(slot, ())]
        self.words = list(dict.fromkeys(
            word for slot in _OPEN for text in self.values.get(slot, ()) for word in text.split()
            if len(word) > 3 and word.isalpha()
        ))

    def call(self, example: Example, rng: random.Random) -> Example:
        """Return a variant of a request that is answered by a tool call with slots."""
        parts = pieces(example)
        if parts is None:
            return example
        swapping = rng.choice((0.0, 0.4, 0.8))
        varied: list[Piece] = []
        for text, slot in parts:
            if slot is None:
                varied.append((_typo(text, rng) if rng.random() < 0.05 else text, slot))
            elif slot in self.values and rng.random() < swapping:
                value = self._value(slot, rng)
                if slot in _OPEN and rng.random() < 0.2:
                    value = self._invented(value, rng)
                varied.append((value, slot))
            else:
                varied.append((text, slot))
        if rng.random() < 0.06:
            varied.insert(0, (rng.choice(_BEFORE), None))
        if rng.random() < 0.04:
            varied.append((rng.choice(_AFTER), None))
        if rng.random() < 0.1:
            varied = [(text.lower(), slot) for text, slot in varied]
        name = json.loads(example.target)["name"]
        return Example(
            task=example.task, input="".join(text for text, _ in varied).strip(),
            target=tool_call(name, [(slot, text) for text, slot in varied if slot is not None]),
        )

    def intent(self, example: Example, rng: random.Random) -> Example:
        """Return a variant of a request that is answered by a name alone."""
        words = example.input.split()
        if len(words) > 3 and rng.random() < 0.07:
            del words[rng.randrange(len(words))]
        text = " ".join(words)
        if rng.random() < 0.08:
            text = _typo(text, rng)
        draw = rng.random()
        if draw < 0.06:
            text = rng.choice(_BEFORE) + text
        elif draw < 0.1:
            text += rng.choice(_AFTER)
        elif draw < 0.2:
            text = text.capitalize() + rng.choice(("", ".", "?"))
        return Example(task=example.task, input=text, target=example.target)

    def _value(self, slot: str, rng: random.Random) -> str:
        if slot in _TITLES:
            pool = self.titles if rng.random() < 0.25 else self.values[slot]
            first = rng.choice(pool)
            if rng.random() < 0.15:  # a title that nobody has heard of
                return _crossed(first, rng.choice(self.titles), rng)
            return first
        first = rng.choice(self.values[slot])
        if slot == "artist" and rng.random() < 0.3:
            return _crossed(first, rng.choice(self.values[slot]), rng)
        return first

    def _invented(self, value: str, rng: random.Random) -> str:
        """Replace half of the longer words of a value by invented ones, to be copied from the text.
        """
        def other(word: str) -> str:
            if not self.words or len(word) < 4 or not word.isalpha() or rng.random() < 0.5:
                return word
            first, second = rng.choice(self.words), rng.choice(self.words)
            coined = first[:rng.randint(2, 4)] + second[len(second) // 2:].lower()
            return coined.lower() if word.islower() else coined

        return " ".join(map(other, value.split()))


def pieces(example: Example) -> list[Piece] | None:
    """Split the request of a tool call at its slots; None if a value does not occur in it.

    A value's place is its first occurrence that no other value has taken.
    """
    arguments = json.loads(example.target)["arguments"]
    pairs = [
        (slot, value)
        for slot, values in arguments.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    spans: list[tuple[int, int, str]] = []
    for slot, value in pairs:
        free = [
            match.span() for match in re.finditer(re.escape(value), example.input)
            if not any(match.start() < end and match.end() > begin for begin, end, _ in spans)
        ]
        if not free:
            return None
        # Whole words before parts of words: the 1 of "rate it 1", not of "in 2019".
        spans.append((*min(free, key=lambda span: not _whole(example.input, *span)), slot))
    result: list[Piece] = []
    end = 0
    for start, stop, slot in sorted(spans):
        if start > end:
            result.append((example.input[end:start], None))
        result.append((example.input[start:stop], slot))
        end = stop
    if end < len(example.input):
        result.append((example.input[end:], None))
    return result


def _whole(text: str, start: int, end: int) -> bool:
    return not (text[start - 1:start].isalnum() or text[end:end + 1].isalnum())


def _crossed(one: str, other: str, rng: random.Random) -> str:
    """Join the beginning of one value and the end of another."""
    first, second = one.split(), other.split()
    head = first[:rng.randint(1, len(first))]
    return " ".join(head + second[len(second) - rng.randint(1, len(second)):])


def _typo(text: str, rng: random.Random) -> str:
    """Drop, double or swap one letter, in a word of at least four."""
    places = [place for place in range(1, len(text) - 2) if text[place - 1:place + 3].isalpha()]
    if not places:
        return text
    at = rng.choice(places)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1:]
    if kind == 1:
        return text[:at] + text[at] + text[at:]
    return text[:at] + text[at + 1] + text[at] + text[at + 2:]
