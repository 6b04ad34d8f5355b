"""Seeded examples of the task `redact`: personal data becomes `[NAME]`, `[PHONE]`, `[EMAIL]`,
`[ADDRESS]`, `[DATE]`, `[CARD]` or `[ACCOUNT]`, and every other character stays.

The rules that the data follows:
- a name is redacted without its title and without a possessive 's; a street named after somebody
  is part of an address, and a word that is also a name (Rose, Will, May) stays where it is a word;
- a date has a day and a month, whatever its spelling; a weekday, a month or a year alone stays;
- a number is redacted only as a phone, a card or a bank account (IBAN): orders, prices, flights,
  rooms, scores, versions and times stay.

Sentences come from templates, or are given (`carriers`) and have personal data put in at random
places: whoever learns from the templates alone knows no other sentence, and garbles it.

Development examples draw first names, streets and mail hosts from lists of their own; names that
are words, some surnames and foreign streets are shared.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import TYPE_CHECKING

from cloister.corpus import Example
from cloister.reference import word_lists

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["LABELS", "carriers", "generate"]

LABELS = ("NAME", "PHONE", "EMAIL", "ADDRESS", "DATE", "CARD", "ACCOUNT")

_KINDS = ("Street", "Road", "Avenue", "Lane", "Drive", "Court", "Way", "Place", "St", "Rd", "Ave",
          "Blvd", "Close", "Terrace")
_FOREIGN = ("Rue de Lyon", "Rue Victor Hugo", "Avenue Foch", "Calle Mayor", "Calle de Alcalá",
            "Via Roma", "Via Garibaldi", "Rua Augusta", "Boulevard Voltaire", "Plaza del Sol")
_GERMAN = ("Hauptstraße", "Bahnhofstraße", "Gartenweg", "Schillerstraße", "Lindenallee",
           "Goethestraße", "Bergstrasse", "Kirchweg")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
           "October", "November", "December")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_THINGS = ("lamp", "printer", "jacket", "blender", "keyboard", "sofa", "bike", "phone case",
           "kettle", "book", "tent", "monitor", "suitcase", "guitar", "coffee machine")

# Kinds of values by their names in templates: patterns of digits (see `_People.digits`), and words.
_PATTERNS = {
    "PHONE": (
        "+44 20 *### ####", "+44 7### ######", "0*## ### ####", "(*##) *##-####", "*##-*##-####",
        "*##.*##.####", "+1 *## *## ####", "+1-*##-*##-####", "+49 *# *######", "0*## ########",
        "07### ######", "+33 * ## ## ## ##", "0* ## ## ## ##", "+91 *#### #####", "555-####",
        "+39 0# #### ####", "*#########"),
    "order": ("*######", "#*##-####", "*####", "A-*####", "20##-0###", "PO*####", "*#########-*"),
    "serial": ("SN-####-####", "X*##K###", "####-##-A"),
    "tracking": ("9400 #### #### #### #### ##", "1Z### ### ## #### ####", "RR#########DE"),
    "price": ("$*#", "$*,###.00", "*## euros", "€*#.##", "£*##", "*# dollars", "$*##.##"),
    "people": ("*##", "*,###", "*#,###", "*## ###"),
    "room": ("*##", "*###", "B*#"),
    "gate": ("*#", "A*", "C*#"),
    "flight": ("BA *##", "LH*###", "UA *###", "AF*###"),
    "version": ("*.#", "*.#.#", "*.*#.#"),
    "pin": ("####", "######", "### ###"),
}
_WORDS = {
    "day": _DAYS, "month": _MONTHS, "thing": _THINGS, "will": ("Will", "May", "Can"),
    "title": ("Mr.", "Mrs.", "Ms.", "Dr.", "Mr", "Mrs", "Professor"),
    "will_low": ("will", "may", "hope to"),
}

_OPENINGS = ("Hello,", "Hi there,", "Good morning,", "Hey,", "Quick note:", "FYI:", "Sorry,")
_LETTERS = "ABDEFGHJLNPQRSTUWXYZ"  # of British postcodes
_PLACE = re.compile(r"\{(\w+)\}")

# What is put into given sentences: one of a kind, drawn by weight.
_INSERTED = {
    5: ("{NAME}", "for {NAME}", "to {NAME}", "with {NAME}", "and {NAME}", "from {NAME}",
        "by {NAME}", "{NAME}'s", ", {NAME},", "of {NAME}", "{title} {LAST}", "for {WORD}",
        "{NAME} and {NAME}"),
    2: ("at {PHONE}", "call {PHONE}", "on {PHONE}", "({PHONE})", "{PHONE}", ", {PHONE},",
        "{EMAIL}", "at {EMAIL}", "to {EMAIL}", "({EMAIL})", "write to {EMAIL}",
        "{ADDRESS}", "at {ADDRESS}", "to {ADDRESS}", "near {ADDRESS}", "from {ADDRESS}",
        ", {ADDRESS},", "{DATE}", "on {DATE}", "by {DATE}", "since {DATE}", "before {DATE}",
        "until {DATE}", "with {CARD}", "card {CARD}", "{CARD}", "account {ACCOUNT}",
        "from {ACCOUNT}", "{ACCOUNT}"),
    1: ("{NAME}, {ADDRESS}", "{NAME}, {PHONE}", "{NAME} ({PHONE})", "{NAME} <{EMAIL}>",
        "{NAME}, {EMAIL}", "{NAME}, born {DATE},", "{NAME} of {ADDRESS}", "{NAME} at {PHONE}",
        "{PHONE} or {EMAIL}", "{EMAIL}, {PHONE}", "{NAME}, {ADDRESS}, {PHONE}"),
    3: ("order {order}", "{price}", "for {price}", "room {room}", "flight {flight}", "at {time}",
        "version {version}", "on {day}", "in {month}", "in {year}", "in {city}", "to {city}",
        "{people}", "gate {gate}", "code {pin}", "number {small}", "{count} of them",
        "from {time}", "serial {serial}", "tracking {tracking}"),
}


def generate(
    count: int, *, seed: int, development: bool = False, carriers: Sequence[str] = (),
) -> Iterator[Example]:
    """Yield `count` examples; the same arguments give the same ones.

    With `carriers`, sentences without personal data, two of three sentences are such a one; in
    development all are, each alone.
    """
    rng = random.Random(f"redact {seed} {development}")
    people = _People(rng, development, carriers)
    for _ in range(count):
        yield people.example()


def carriers(texts: Sequence[str]) -> list[str]:
    """Return the sentences of `texts` in which nothing looks like personal data.

    That is no digit, no capital but the first, no name of the lists or of a month, and no word
    that `texts` write with a capital only.
    """
    lists = word_lists("redaction")
    names = {word.lower() for kind in ("first", "last", "cities") for word in lists[kind]}
    names |= {word.lower() for word in (*_MONTHS, *_DAYS)}
    within = [word for text in texts for word in re.findall(r"(?<=[a-z,;] )[^\W\d_]+", text)]
    names |= {word.lower() for word in within if word[0].isupper()}.difference(within)
    usual = set(within)
    chosen: dict[str, None] = {}
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            words = re.findall(r"[^\W_]+", sentence)
            if not 3 <= len(sentence.split()) <= 20 or re.search(r"[\d\"\[\]{}@]|''|``", sentence):
                continue
            if any(word[0].isupper() and word != "I" for word in words[1:]):
                continue
            if words[0].lower() in usual and names.isdisjoint(word.lower() for word in words):
                chosen[sentence.strip()] = None
    return list(chosen)


class _People:
    """A source of invented personal data, and text around it."""

    def __init__(self, rng: random.Random, development: bool, carriers: Sequence[str] = ()) -> None:
        self.rng, self.development, self.carriers = rng, development, carriers
        # Templates have a kind of personal data, or of what only looks like it, in braces.
        self.lists: dict[str, list[str]] = word_lists("redaction")

        def ours(kind: str) -> list[str]:
            return [name for name in self.lists[kind] if (_number(name) % 8 == 0) == development]

        self.first, self.last = ours("first"), ours("last")
        self.streets, self.hosts = ours("streets"), ours("hosts")

    def example(self) -> Example:
        rng = self.rng
        if self.carriers and self.development:
            return self.cased(*self.carried(rng.choice(self.carriers), alone=True))
        source, target = [], []
        if rng.random() < 0.15:
            opening = rng.choice(_OPENINGS)
            source.append(opening)
            target.append(opening)
        count = rng.choice((1, 1, 1, 2, 2, 3))
        for _ in range(count):
            if self.carriers and rng.random() < 2 / 3:
                text, redacted = self.carried(rng.choice(self.carriers), alone=count == 1)
            else:
                text, redacted = self.sentence(rng.choice(self.lists["templates"]))
            source.append(text)
            target.append(redacted)
        mark = "\n" if self.carriers and rng.random() < 0.1 else " "
        return self.cased(mark.join(source), mark.join(target))

    def carried(self, sentence: str, *, alone: bool) -> tuple[str, str]:
        """Return `sentence` with up to three insertions, and the same redacted."""
        rng = self.rng
        plain = sentence[0].islower()
        if plain and (not alone or rng.random() < 0.5):  # as a request is written with care
            sentence = sentence[0].upper() + sentence[1:] + rng.choice((".", "?", "!", "."))
        end = sentence[-1] if sentence[-1] in ".?!" else ""
        words = sentence.removesuffix(end).split()
        places = set(rng.sample(range(len(words) + 1), rng.choice((0, 1, 1, 1, 2, 2, 3))))
        if places and rng.random() < 0.4:  # where most are in a sentence of one's own
            places = {*list(places)[1:], len(words)}
        parts = []
        for number, word in enumerate([*words, ""]):
            if number in places:
                weight = rng.choices(list(_INSERTED), list(_INSERTED))[0]
                part = self.sentence(rng.choice(_INSERTED[weight]))
                without = plain and rng.random() < 0.1  # capitals, as some type
                parts.append(_lowered(*part) if without else part)
            somebody = word.lower() in ("he", "she", "him") and rng.random() < 0.25
            parts.append(self.sentence("{NAME}" if somebody else word))
        source, target = map(_spaced, zip(*parts, strict=True))
        return source + end, target + end

    def cased(self, source: str, target: str) -> Example:
        """Return an example, now and then without capitals, as people type."""
        if self.rng.random() < 0.12:
            source, target = _lowered(source, target)
        return Example(task="redact", input=source, target=target)

    def sentence(self, template: str) -> tuple[str, str]:
        """Fill a template; return it, and the same redacted."""
        source, target, end = "", "", 0
        for match in _PLACE.finditer(template):
            plain = template[end:match.start()]
            kind = match[1]
            value = self.value(kind)
            label = "NAME" if kind in ("FIRST", "LAST", "WORD") else kind
            source += plain + value
            target += plain + (f"[{label}]" if label in LABELS else value)
            end = match.end()
        target = target.replace("[NAME] [NAME]", "[NAME]")  # a given name, then a surname
        return source + template[end:], target + template[end:]

    def value(self, kind: str) -> str:
        """Draw a value of the kind that stands in a template's braces."""
        if kind in _PATTERNS:
            return self.digits(self.rng.choice(_PATTERNS[kind]))
        if kind in _WORDS:
            return self.rng.choice(_WORDS[kind])
        drawn: str = getattr(self, f"_{kind}")()
        return drawn

    def digits(self, pattern: str) -> str:
        """Fill `pattern`: each # becomes a digit, each * a digit from 1."""
        rng = self.rng
        return "".join(
            str(rng.randrange(10)) if c == "#" else str(rng.randint(1, 9)) if c == "*" else c
            for c in pattern
        )

    def surname(self) -> str:
        """Draw a surname from the lists, or invent one."""
        draw = self.rng.random()
        if draw < 0.25:
            return self.rng.choice(self.lists["last_words"])
        if draw < 0.5:
            return _invented(self.rng)
        return self.rng.choice(self.last)

    def given(self) -> str:
        """Draw a given name from the list, or invent one."""
        if self.rng.random() < 0.2:
            return _invented(self.rng)
        return self.rng.choice(self.first)

    def _NAME(self) -> str:  # noqa: N802  # named after their places in the templates
        draw = self.rng.random()
        if draw < 0.3:
            return self.given()
        if draw < 0.4:
            return f"{self._WORD()} {self.surname()}"
        if draw < 0.5:
            return f"{self.given()} {self.rng.choice('ABCDEFGHJKLMNPRSTW')}. {self.surname()}"
        if draw < 0.55:
            return f"{self.given()} {self.surname()}-{self.surname()}"
        return f"{self.given()} {self.surname()}"

    def _FIRST(self) -> str:  # noqa: N802
        return self.given()

    def _LAST(self) -> str:  # noqa: N802
        return self.surname()

    def _WORD(self) -> str:  # noqa: N802
        return self.rng.choice(self.lists["words"])

    def _EMAIL(self) -> str:  # noqa: N802
        rng = self.rng
        first, last = _ascii(self.given()), _ascii(self.surname())
        name = rng.choice((
            f"{first}.{last}", f"{first}{last}", f"{first[0]}{last}", f"{first}_{last}",
            f"{first}{self.digits('##')}", f"{last}.{first[0]}", f"{first}", f"info+{last}",
        ))
        return f"{name}@{rng.choice(self.hosts)}"

    def _ADDRESS(self) -> str:  # noqa: N802
        rng = self.rng
        number = str(rng.choice((rng.randint(1, 99), rng.randint(1, 2500))))
        city = rng.choice(self.lists["cities"])
        draw = rng.random()
        if draw < 0.12:
            return f"{number} {rng.choice(_FOREIGN)}, {self.digits('#####')} {city}"
        if draw < 0.24:
            return f"{rng.choice(_GERMAN)} {number}, {self.digits('#####')} {city}"
        name = rng.choice(self.streets) if rng.random() < 0.7 else self.surname()
        number += rng.choice(("", "", "", "", "A", "B"))
        street = f"{number} {name} {rng.choice(_KINDS)}"
        after = [
            "", "", f", {city}", f", {city} {self.digits('#####')}", f", Apt {self.digits('*#')}",
        ]
        state = rng.choice(("TX", "CA", "NY", "WA", "OR", "MA"))
        after.append(f", {city}, {state} {self.digits('#####')}")
        quarter = rng.choice(("NW", "SE", "E", "W")) + self.digits("* *")
        after.append(f", {city} {quarter}" + "".join(rng.choices(_LETTERS, k=2)))
        return street + rng.choice(after)

    def _DATE(self) -> str:  # noqa: N802
        rng = self.rng
        month, day, year = rng.randint(1, 12), rng.randint(1, 28), rng.randint(1940, 2035)
        name = _MONTHS[month - 1]
        ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
        ordinal = f"{day}{ending}"
        return rng.choice((
            f"{day} {name} {year}", f"{name} {day}, {year}", f"{name} {ordinal}", f"{day} {name}",
            f"{year}-{month:02}-{day:02}", f"{day:02}/{month:02}/{year}", f"{month}/{day}/{year}",
            f"{day}.{month}.{year}", f"the {ordinal} of {name}", f"{name[:3]} {day}",
            f"{ordinal} {name} {year}", f"{day:02}/{month:02}/{year % 100:02}",
        ))

    def _CARD(self) -> str:  # noqa: N802
        """Draw sixteen digits that pass the check of ISO/IEC 7812."""
        body = self.rng.choice("45") + self.digits("#" * 14)
        total = sum(sum(divmod(int(c) * (2 - i % 2), 10)) for i, c in enumerate(body))
        number = body + str(-total % 10)
        mark = self.rng.choice((" ", " ", "-", ""))
        return mark.join(number[i:i + 4] for i in range(0, 16, 4))

    def _ACCOUNT(self) -> str:  # noqa: N802
        return self.rng.choice((
            self.digits("DE## #### #### #### #### ##"), self.digits("DE####################"),
            self.digits("FR## #### #### #### #### #### ###"),
            self.digits("NL## ABNA #### #### ##"), self.digits("GB## BARC #### #### #### ##"),
            self.digits("ES## #### #### #### #### ####"),
        ))

    # Not personal data: these stay.

    def _count(self) -> str:
        return str(self.rng.randint(2, 90))

    def _small(self) -> str:
        return str(self.rng.randint(1, 12))

    def _score(self) -> str:
        return f"{self.rng.randint(0, 40)}-{self.rng.randint(0, 40)}"

    def _ip(self) -> str:
        return ".".join(str(self.rng.randint(1, 254)) for _ in range(4))

    def _time(self) -> str:
        hour, minute = self.rng.randint(1, 12), self.rng.choice((0, 15, 20, 30, 45))
        return self.rng.choice((f"{hour} pm", f"{hour}:{minute:02}", f"{hour}:{minute:02} am",
                                f"{hour} o'clock", "noon"))

    def _year(self) -> str:
        return str(self.rng.randint(1950, 2035))

    def _city(self) -> str:
        return self.rng.choice(self.lists["cities"])


def _lowered(source: str, target: str) -> tuple[str, str]:
    labels = re.sub(r"\[(\w+)\]", lambda match: f"[{match[1].upper()}]", target.lower())
    return source.lower(), labels


def _spaced(parts: Iterable[str]) -> str:
    """Join `parts`, with commas where they belong."""
    return re.sub(r",?(?: ,)+", ",", " ".join(parts)).strip(" ,")


def _number(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def _ascii(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _invented(rng: random.Random) -> str:
    """Invent a pronounceable name that no list has."""
    start = ("B", "Br", "C", "Ch", "D", "Dr", "F", "G", "Gr", "H", "J", "K", "Kr", "L", "M", "N",
             "P", "R", "S", "Sh", "St", "T", "Tr", "V", "W", "Y", "Z")
    middle = ("a", "e", "i", "o", "u", "ai", "ee", "ia", "ou")
    joint = ("l", "n", "r", "s", "t", "v", "m", "d", "k", "nd", "rt", "ll", "nn", "sh")
    end = ("a", "o", "en", "er", "in", "is", "ov", "ski", "son", "ez", "ini", "y", "as", "el")
    return (rng.choice(start) + rng.choice(middle) + rng.choice(joint)
            + (rng.choice(middle) + rng.choice(joint) if rng.random() < 0.4 else "")
            + rng.choice(end))
