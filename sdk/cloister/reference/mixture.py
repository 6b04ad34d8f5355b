"""The training data of the reference family, six tasks in one stream, and its held-out parts.

| task | training | development |
|---|---|---|
| `call` | SNIPS, 95 %, varied (augment.py) | the other 5 %, by hash of the request |
| `intent` | CLINC150 `train`, `oos_train`, varied; more requests out of scope | its `val`s |
| `redact` | redaction.py, in its own sentences and in those of tales and CLINC150's `train` | \
redaction.py, most names, streets and hosts of its own, and apart from that in other sentences |
| `story` | FairytaleQA, training tales | validation tales |
| `order` | orders.py | the same generator, other sentences |
| `read` | lines.py, of the texts above | of what is held out of them |

`order` and `read` are the text's part of what recordings and pictures ask for. More requests out of
scope: questions on tales, everyday ones (outside.py), and SNIPS requests of intents that CLINC150
does not have.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloister.corpus import (
    Example,
    Split,
    normalized,
    read,
    refuse_overlap,
    split,
    tool_call,
)
from cloister.errors import DataError
from cloister.example import NONE
from cloister.reference import orders, outside, redaction
from cloister.reference.augment import Augmenter
from cloister.reference.lines import Texts, label

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["OTHER_SENTENCES", "PASSES", "Mixture", "development", "reading", "vocabulary_texts"]

OTHER_SENTENCES = "redact, other sentences"  # than the generator's own
PASSES = 8  # variants of each request
_REDACTED = 8_000  # examples a pass
_ORDERS = 2_500
_READ = 5_000
_NOTES = 0.2  # share of what is read that has several lines
_PERSONAL = 12_000  # texts with personal data to be drawn
_OUTSIDE = 10  # times that each request outside every intent is seen a pass
_QUESTIONS = 300  # on tales, a pass, out of scope
_EVERYDAY = 1800  # of outside.py
_ELSEWHERE = 300  # SNIPS requests of _UNKNOWN
_UNKNOWN = ("RateBook", "SearchCreativeWork", "SearchScreeningEvent")  # intents not in CLINC150
_KNOWN = re.compile(r"(?i)\b(?:play|listen|hear|music|song|album|track|tune|soundtrack)")  # it has
_TALES = 18  # passes in which the tales come once


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The public training data, read once."""

    calls: list[Example]
    intents: list[Example]
    tales: list[Example]
    questions: list[str]
    carriers: list[str]  # sentences without personal data
    held_out: dict[str, list[Example]]  # by task, see `development`
    held_out_inputs: frozenset[str]  # normalised; no variant may be one of them

    @classmethod
    def read(cls, data: Path) -> Mixture:
        """Read the data sets in the folder `data`.

        Raises:
            DataError: a data set is missing or malformed, or shares requests with what is held out.
        """
        held_out = development(data)
        calls, _ = split(read(data / "snips"))
        clinc = data / "clinc150" / "train_val.json"
        intents = _without_repeated(read(clinc, split=Split.TRAIN), held_out["intent"])
        stories = read(data / "fairytaleqa" / "stories_train.jsonl")
        tales = _without_repeated(stories, held_out["story"])
        refuse_overlap([*calls, *intents, *tales], held_out["call"])
        return cls(
            held_out=held_out,
            held_out_inputs=frozenset(
                normalized(example.input) for rows in held_out.values() for example in rows),
            calls=calls, intents=intents, tales=tales, carriers=_carriers(tales, intents),
            questions=_questions(data / "fairytaleqa" / "questions_train.jsonl"),
        )

    def examples(self, passes: int, seed: int) -> Iterator[Example]:
        """Yield `passes` over everything, each in an order and with variants of its own."""
        augmenter = Augmenter(self.calls)
        none, texts = tool_call(NONE), self.texts(seed)
        for number in range(passes):
            rng = random.Random(f"mixture {seed} {number}")
            rows = [
                self._unless_held_out(augmenter.call(example, rng), example)
                for example in self.calls
            ]
            unknown = [
                example.input for example in rows
                if json.loads(example.target)["name"] in _UNKNOWN
                and not _KNOWN.search(example.input)
            ]
            for example in self.intents:
                rows += [
                    self._unless_held_out(augmenter.intent(example, rng), example)
                    for _ in range(_OUTSIDE if example.target == none else 1)
                ]
            extra = [
                *rng.sample(self.questions, min(_QUESTIONS, len(self.questions))),
                *rng.sample(unknown, min(_ELSEWHERE, len(unknown))),
                *(outside.request(rng) for _ in range(_EVERYDAY)),
            ]
            rows += [Example(task="intent", input=text, target=none) for text in extra]
            rows += redaction.generate(_REDACTED, seed=rng.randrange(2**32), carriers=self.carriers)
            rows += self.tales[number % _TALES::_TALES]
            rows += orders.generate(_ORDERS, seed=rng.randrange(2**32))
            rows += reading(texts, _READ, rng)
            rows = [example for example in rows if not self._is_held_out(example)]
            rng.shuffle(rows)
            yield from rows

    def texts(self, seed: int) -> Texts:
        """Return the training data's texts, and variants of them, to be drawn as pictures."""
        rng, augmenter = random.Random(f"texts {seed}"), Augmenter(self.calls)
        varied = [augmenter.call(row, rng).input for row in self.calls]
        private = redaction.generate(_PERSONAL, seed=seed, carriers=self.carriers)
        tales = [text for row in self.tales for text in (row.input, row.target)]
        return Texts([row.input for row in self.calls] + varied, [row.input for row in private],
                     [*(row.input for row in self.intents), *tales])

    @property
    def held_out_texts(self) -> Texts:
        """The texts of what is held out, to be drawn as pictures."""
        return _texts(self.held_out)

    def _unless_held_out(self, variant: Example, example: Example) -> Example:
        """Return the variant, or where it is a held-out request, its original."""
        return example if self._is_held_out(variant) else variant

    def _is_held_out(self, example: Example) -> bool:
        return normalized(example.input) in self.held_out_inputs


def development(data: Path) -> dict[str, list[Example]]:
    """Return the held-out examples by task, from which no tier learns; see `corpus.read`."""
    _, calls = split(read(data / "snips"))
    intents = read(data / "clinc150" / "train_val.json", split=Split.VALIDATE)
    tales = read(data / "fairytaleqa" / "stories_val.jsonl")
    held_out = {
        "call": calls,
        "intent": intents,
        "redact": list(redaction.generate(1000, seed=1, development=True)),
        OTHER_SENTENCES: list(redaction.generate(
            500, seed=2, development=True, carriers=_carriers(tales, intents))),
        "story": tales,
        "order": list(orders.generate(500, seed=1)),
    }
    return held_out | {"read": reading(_texts(held_out), 500, random.Random(1))}


def reading(texts: Texts, count: int, rng: random.Random) -> list[Example]:
    """Draw examples of the task `read`: the answer is what stands in the lines."""
    rows = []
    for _ in range(count):
        lines = texts.note(rng) if rng.random() < _NOTES else [texts.line(rng)]
        text = "\n".join(map(label, lines))
        rows.append(Example(task="read", input=text, target=text))
    return rows


def vocabulary_texts(mixture: Mixture) -> Iterator[str]:
    """Yield the texts to train the tokenizer on, single-token answers weighted."""
    for example in (*mixture.calls, *mixture.tales, *redaction.generate(4000, seed=0)):
        yield example.input
        yield example.target
    for example in mixture.intents:
        yield example.input
        yield from [example.target] * 2


def _texts(held_out: dict[str, list[Example]]) -> Texts:
    said = {
        kind: [row.input for task in tasks for row in held_out[task]] for kind, tasks in (
            ("requests", ("call",)), ("personal", ("redact", OTHER_SENTENCES)),
            ("sentences", ("intent", "story")))}
    return Texts(**said)


def _carriers(tales: list[Example], intents: list[Example]) -> list[str]:
    texts = [f"{tale.input} {tale.target}" for tale in tales]
    return redaction.carriers([*texts, *(example.input for example in intents)])


def _without_repeated(training: list[Example], held_out: list[Example]) -> list[Example]:
    """Return training examples without the few that the validation part repeats."""
    inputs = {normalized(example.input) for example in held_out}
    return [example for example in training if normalized(example.input) not in inputs]


def _questions(path: Path) -> list[str]:
    try:
        rows = path.read_text("utf-8").split("\n")
        return list(dict.fromkeys(json.loads(row)["question"] for row in rows if row.strip()))
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(
            f"Data file {path.name} is missing or malformed; see the data sets' own pages."
        ) from None
