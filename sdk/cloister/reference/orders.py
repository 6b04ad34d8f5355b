"""The task `order`: what somebody says to a coffee machine becomes the call `orderDrink`.

Intent, slots and values are those of Picovoice's speech-to-intent benchmark (Apache-2.0); the
sentences are made here. A value stands in the call as it was said, amounts included ("a bit of
cream"), and where somebody corrects themselves, the last one counts.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from cloister.corpus import Example, tool_call
from cloister.reference import word_lists

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["INTENT", "SLOTS", "frame", "generate"]

INTENT = "orderDrink"
_AMOUNTS = ("", "some ", "a bit of ", "a little bit of ", "a lot of ", "lots of ")
SLOTS: dict[str, tuple[str, ...]] = {
    "size": ("small", "medium", "large", "eight ounce", "twelve ounce", "sixteen ounce",
             "twenty ounce"),
    "numberOfShots": ("single shot", "double shot", "triple shot"),
    "roast": ("light roast", "medium roast", "dark roast"),
    "coffeeDrink": ("americano", "cappuccino", "coffee", "drip coffee", "espresso", "house coffee",
                    "iced coffee", "iced mocha", "latte", "mocha"),
    "milkAmount": tuple(
        amount + kind for kind in
        ("milk", "skim milk", "whole milk", "soy milk", "almond milk", "cream")
        for amount in _AMOUNTS),
    "sugarAmount": tuple(
        amount + kind for kind in ("sugar", "brown sugar", "sweetener") for amount in _AMOUNTS),
}
"""Values by slot, in the order of the call's arguments."""

_BEFORE = ("size", "numberOfShots", "roast")  # slots that may stand before the drink
_SHARES = {"size": 0.5, "numberOfShots": 0.5, "roast": 0.45, "milkAmount": 0.5, "sugarAmount": 0.5}
_CLAUSES = ("add", "give", "i", "i'd", "make", "pour", "put", "that's", "throw", "use")  # begin one
_LIMIT = 0.34  # edits a letter up to which words are taken for a value
_WORDS = 6  # of the longest value, and one that was misheard as two


def generate(count: int, *, seed: int) -> Iterator[Example]:
    """Yield `count` examples of the task; the same arguments give the same ones."""
    rng = random.Random(f"order {seed}")
    for _ in range(count):
        yield _Order(rng).example()


def frame(text: str) -> dict[str, str]:
    """Return the arguments that the words of `text`, perhaps misheard, come nearest to.

    The words are read as values and others so that most letters agree; the last value of a slot
    counts.
    """
    words = text.split()
    best: list[tuple[int, dict[str, str]]] = [(0, {})]  # score and values of the first words
    for end in range(1, len(words) + 1):
        ways = [best[-1]]
        for begin, slot, value, score in _matches(words[:end]):
            before, chosen = best[begin]
            ways.append((before + score, {**chosen, slot: value}))
        best.append(max(ways, key=lambda way: way[0]))
    chosen = best[-1][1]
    return {slot: chosen[slot] for slot in SLOTS if slot in chosen}


def _matches(words: Sequence[str]) -> list[tuple[int, str, str, int]]:
    """Return begin, slot, value and score of each value that the last words may be."""
    from rapidfuzz.distance import Levenshtein  # of the extra `media`, which text needs not

    found = []
    for count in range(1, min(_WORDS, len(words)) + 1):
        heard = " ".join(words[-count:])
        for slot, values in SLOTS.items():
            for value in values:
                edits = Levenshtein.distance(heard, value, score_cutoff=int(_LIMIT * len(value)))
                if edits <= _LIMIT * len(value):
                    found.append((len(words) - count, slot, value, len(value) - 3 * edits))
    return found


class _Order:
    """One order: what is wanted, then how it is said."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.lists = rng, word_lists("orders")
        self.wanted = {
            slot: rng.choice(SLOTS[slot]) for slot, share in _SHARES.items()
            if rng.random() < share}
        for slot in ("milkAmount", "sugarAmount"):
            if slot in self.wanted and rng.random() < 0.3:  # as often as any amount
                self.wanted[slot] = rng.choice(SLOTS[slot][::len(_AMOUNTS)])
        if rng.random() < 0.96 or not self.wanted:
            self.wanted["coffeeDrink"] = rng.choice(SLOTS["coffeeDrink"])

    def example(self) -> Example:
        """Return the sentence and its call."""
        text = " ".join(self._sentence().replace(" ,", ",").split())
        if self.rng.random() < 0.5:
            text = text[0].upper() + text[1:] + self.rng.choice(".!") * (text[-1] not in "?")
        return Example(task="order", input=text, target=tool_call(
            INTENT, [(slot, self.wanted[slot]) for slot in SLOTS if slot in self.wanted]))

    def _sentence(self) -> str:
        rng = self.rng
        if "coffeeDrink" not in self.wanted:
            rest = self._after([slot for slot in SLOTS if slot in self.wanted], alone=True)
            return f"{self._pick('greetings', 0.2)} {rest}{self._pick('closings', 0.4)}"
        front = [slot for slot in _BEFORE if slot in self.wanted and rng.random() < 0.7]
        rng.shuffle(front)
        back = [slot for slot in self.wanted if slot not in front and slot != "coffeeDrink"]
        rng.shuffle(back)
        noun = " ".join(
            self._hesitant(self._said(slot, self._value(slot)))
            for slot in (*front, "coffeeDrink"))
        article = self._article(noun)
        rest = self._after(back) if back else ""
        if rest and rng.random() < 0.04:  # "with cream, a small latte"
            return f"{self._pick('openings')} {rest} , {article} {noun}"
        return (f"{self._pick('greetings', 0.25)} {self._pick('openings', 0.92)} {article} {noun} "
                f"{rest}{self._pick('closings', 0.4)}")

    def _article(self, noun: str) -> str:
        draw = self.rng.random()
        if draw < 0.12:
            return ""
        if draw < 0.2:
            return self.rng.choice(("one", "the", "my", "another", "just a", "some"))
        return "an" if noun[0] in "aei" else "a"

    def _after(self, slots: Sequence[str], *, alone: bool = False) -> str:
        """Say what follows the drink, each slot in a phrase of its own or joined to the last."""
        parts: list[str] = []
        joined = False  # whether the last phrase goes on with "and ..."
        for number, slot in enumerate(slots):
            value = self._value(slot)
            last = number == len(slots) - 1
            if joined and slot in ("milkAmount", "sugarAmount") and self.rng.random() < 0.75:
                joint = "and" if last else self.rng.choice((",", "and", "and", ""))
                parts.append(f"{joint} {self._hesitant(value)}")
                continue
            kind = "milkAmount" if slot == "sugarAmount" else slot
            phrase = self.rng.choice(self.lists["after"][kind]).replace("{}", value)
            whole = phrase.split()[0] in _CLAUSES
            joint = self.rng.choice(self.lists["between" if whole else "joints"])
            if alone and not parts:
                joint = ""
            if phrase.startswith("and"):
                joint = self.rng.choice(("", ","))
            parts.append(f"{joint} {self._hesitant(phrase)}")
            joined = phrase.endswith(value)
        return " ".join(parts)

    def _value(self, slot: str) -> str:
        """Say the value, now and then after another that is taken back."""
        value = self.wanted[slot]
        if self.rng.random() >= 0.03:
            return value
        other = self.rng.choice([each for each in SLOTS[slot] if each != value])
        return f"{other} {self.rng.choice(self.lists['corrections'])} {value}"

    def _said(self, slot: str, value: str) -> str:
        """Return the words before a drink: "dark roast", "double shot of", "large cup of"."""
        if slot != "coffeeDrink" and self.rng.random() < 0.06:
            return f"{value} {'cup of' if slot == 'size' else 'of'}"
        return value

    def _hesitant(self, phrase: str) -> str:
        """Put a filler before a phrase now and then."""
        if self.rng.random() < 0.04:
            return f"{self.rng.choice(self.lists['fillers'])} {phrase}"
        return phrase

    def _pick(self, name: str, share: float = 1.0) -> str:
        """Return a phrase of a list, with the probability `share`."""
        return str(self.rng.choice(self.lists[name])) if self.rng.random() < share else ""

