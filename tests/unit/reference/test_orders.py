"""Orders to a coffee machine: varied sentences, and calls that say what the sentences say."""

import json
import random
from pathlib import Path

import pytest

from cloister.corpus import read
from cloister.evaluate import transcript
from cloister.reference import orders
from cloister.settings import Settings


def arguments(target: str) -> dict[str, str]:
    return json.loads(target)["arguments"]


def heard(text: str) -> str:
    written = transcript.said(text)
    assert written is not None
    return transcript.words(written)


def test_the_same_seed_gives_the_same_orders_and_another_gives_others() -> None:
    first = list(orders.generate(50, seed=1))
    assert first == list(orders.generate(50, seed=1))
    assert first != list(orders.generate(50, seed=2))


def test_orders_hardly_repeat_and_say_every_value_of_every_slot() -> None:
    made = list(orders.generate(3000, seed=0))
    assert len({example.input for example in made}) > 2900
    said = {pair for example in made for pair in arguments(example.target).items()}
    assert said == {(slot, value) for slot, values in orders.SLOTS.items() for value in values}


def test_every_order_can_be_said_and_holds_the_values_of_its_call_as_words() -> None:
    for example in orders.generate(1000, seed=3):
        words = f" {heard(example.input)} "
        for value in arguments(example.target).values():
            assert f" {value} " in words


def test_the_words_of_an_order_give_its_call() -> None:
    made = list(orders.generate(500, seed=4))
    right = sum(orders.frame(heard(example.input)) == arguments(example.target) for example in made)
    assert right / len(made) > 0.98


def test_of_a_value_that_is_taken_back_the_later_counts() -> None:
    assert orders.frame("a small no make that a large latte") == {
        "size": "large", "coffeeDrink": "latte"}


def test_a_value_is_found_in_words_that_were_misheard() -> None:
    rng = random.Random(5)
    right = total = 0
    for example in orders.generate(300, seed=6):
        letters = list(heard(example.input))
        for place in rng.sample(range(len(letters)), len(letters) // 20):
            letters[place] = rng.choice("abcdefghijklmnopqrstuvwxyz")
        found = orders.frame("".join(letters))
        wanted = arguments(example.target)
        right += sum(found.get(slot) == value for slot, value in wanted.items())
        total += len(wanted)
    assert right / total > 0.9


def test_words_without_an_order_give_no_slots() -> None:
    assert orders.frame("") == {}
    assert orders.frame("what is the weather in paris tomorrow") == {}


def test_every_label_of_the_recordings_is_an_order_of_the_grammar() -> None:
    folder = Settings.from_environment().data
    if folder is None:
        pytest.skip("CLOISTER_DATA is not set")
    examples = read(Path(folder) / "spoken_orders")
    assert len(examples) > 100
    for example in examples:
        call = json.loads(example.target)
        assert call["name"] == orders.INTENT
        for slot, value in call["arguments"].items():
            assert value in orders.SLOTS[slot]
        said = "i'd like " + " and ".join(call["arguments"].values())
        assert orders.frame(said) == call["arguments"]
