"""Texts of lines are drawable, short enough, repeatable, and cover every character."""

import json
import random
import re
from importlib import resources

from cloister.reference.lines import ALPHABET, LONGEST, Texts, clean, label, receipt, wrapped

TEXTS = Texts(["play some jazz on youtube", "will it rain in Rome"],
              ["call Ana on 0201 555 1234 about order 12", "£5 to Zoë"],
              ["Once upon a time there was a miller who had three sons. " * 3])


def test_a_line_has_characters_of_the_alphabet_and_is_never_empty_or_too_long() -> None:
    rng = random.Random(0)
    for longest in (1, 8, LONGEST):
        lines = [TEXTS.line(rng, longest) for _ in range(500)]
        assert all(0 < len(line) <= longest for line in lines)
        assert all(line == line.strip() for line in lines)
        assert not set("".join(lines)) - set(ALPHABET)


def test_every_character_is_drawn_often_enough_to_be_learnt() -> None:
    rng = random.Random(0)
    drawn = "".join(TEXTS.line(rng) for _ in range(4000))
    assert min(drawn.count(character) for character in ALPHABET) > 20


def test_the_same_seed_gives_the_same_lines_and_another_gives_others() -> None:
    def drawn(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [TEXTS.line(rng) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_note_has_two_to_four_lines() -> None:
    rng = random.Random(0)
    notes = [TEXTS.note(rng) for _ in range(200)]
    assert {len(note) for note in notes} == {2, 3, 4}
    assert all(0 < len(line) <= LONGEST for note in notes for line in note)


def test_wrapped_lines_hold_the_text_again() -> None:
    text = "a text of words and averylongwordthatisnotbroken elsewhere"
    assert " ".join(wrapped(text, 30)) == text
    cut = wrapped(text, 10)
    assert max(map(len, cut)) <= 10
    assert "".join(cut).replace(" ", "") == text.replace(" ", "")


def test_typographic_marks_become_those_that_are_typed() -> None:
    assert clean("\u201cIt\u2019s\u201d  \u2013\n caf\u00e9 \u5b98") == "\"It's\" - caf\u00e9 "
    assert label("Milk   2.50") == "Milk 2.50"


def test_every_symbol_of_the_receipts_grammar_is_there_and_drawn_out() -> None:
    grammar = json.loads(
        resources.files("cloister.reference").joinpath("receipts.json").read_text("utf-8"))
    rng = random.Random(0)
    used = {symbol.lower() for options in grammar.values() for option in options
            for symbol in re.findall(r"\{(\w+)\}", option)}
    assert used - {"hash", "star"} == grammar.keys() - {"line"}
    for symbol in grammar:
        for _ in range(100):
            drawn = receipt(rng, symbol)
            assert not re.search(r"[{}]", drawn) and not set(drawn) - set(ALPHABET)
    assert receipt(rng, "TOTAL").isupper()
