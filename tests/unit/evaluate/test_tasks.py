"""Scores count what their names say, whatever a model answers."""

import json
from pathlib import Path

import pytest

from cloister.corpus import Example, tool_call
from cloister.errors import DataError
from cloister.evaluate.tasks import check, correct, flips, scores, spans


def call(text: str, name: str, *slots: tuple[str, str]) -> Example:
    return Example(task="call", input=text, target=tool_call(name, slots))


PLAY = call("play Blue by Joni", "Play", ("album", "Blue"), ("artist", "Joni"))
ASK = Example(task="intent", input="how much", target=tool_call("balance"))
OUT = Example(task="intent", input="why", target=tool_call("none"))


@pytest.mark.parametrize(("answer", "right"), [
    (PLAY.target, True),
    ('{"arguments":{"artist":"Joni","album":"Blue"},"name":"Play"}', True),
    (json.dumps({"name": "Play", "arguments": {"album": ["Blue"], "artist": "Joni"}}), True),
    (PLAY.target + "}", False), (PLAY.target[:-1], False), ("", False), ("[]", False),
    ("null", False), ("7", False), ('"Play"', False), ("[" * 100_000, False),
    ('{"name": "Play"}', False), ('{"name": "Play", "arguments": []}', False),
    ('{"name": ["Play"], "arguments": {}}', False),
    ('{"name": "Play", "arguments": {"album": 3}}', False),
    ('{"name": "Play", "arguments": {"album": {"x": "y"}}}', False),
    (tool_call("Play", [("album", "blue"), ("artist", "Joni")]), False),
    (tool_call("Play", [("album", "Blue")]), False),
    (tool_call("Add", [("album", "Blue"), ("artist", "Joni")]), False),
    (json.dumps({**json.loads(PLAY.target), "more": 1}), False),
    (PLAY.target.replace('{"album": ', '{"artist": "Cher", "album": '), False),  # the last one wins
])
def test_a_frame_is_exact_when_name_and_all_arguments_are(answer: str, right: bool) -> None:
    assert correct([PLAY], [answer]) == [right]
    assert scores([PLAY], [answer])["frame_exact"].value == right


def test_the_intent_counts_apart_from_the_slots() -> None:
    found = scores([PLAY] * 4, [PLAY.target, tool_call("Play"), tool_call("Add"), "?"])
    assert found["intent_accuracy"].value == 0.5
    assert found["frame_exact"].value == 0.25
    assert found["frame_exact"].error == pytest.approx((0.25 * 0.75 / 4) ** 0.5)


def test_slot_f1_counts_spans() -> None:
    """Of 4 wanted and 3 given, one is right: 2 * 1 / 7."""
    answers = [tool_call("Play", [("album", "Blue"), ("artist", "Blue")]),
               tool_call("Play", [("artist", "Mary")])]
    assert scores([PLAY, PLAY], answers)["slot_f1"].value == pytest.approx(2 / 7)
    assert scores([PLAY], [PLAY.target])["slot_f1"].value == 1
    assert scores([PLAY], ["?"])["slot_f1"].value == 0
    none = call("play", "Play")
    assert scores([none], [none.target])["slot_f1"].value == 1


def test_a_value_stands_at_its_first_place_that_is_free() -> None:
    assert spans("one two one", {"a": ["one", "one"], "b": ["two"]}) == [
        ("a", 0, 3), ("a", 8, 11), ("b", 4, 7)]
    assert spans("one", {"a": ["one"], "b": ["one"]})[0] == ("a", 0, 3)
    (outside,) = spans("one", {"a": ["two"]})
    assert outside[1] < 0
    assert len(set(spans("x", {"a": ["p", "p", ""]}))) == 3


def test_a_value_that_stands_nowhere_is_wrong_even_if_it_is_the_one_wanted() -> None:
    """A frame of the data set whose value is not in its text: no span can be right."""
    odd = call("play it", "Play", ("album", "Blue"))
    assert scores([odd], [odd.target])["slot_f1"].value == 0
    assert scores([odd], [odd.target])["frame_exact"].value == 1


def test_in_scope_accuracy_and_out_of_scope_recall_count_apart() -> None:
    found = scores([ASK, ASK, ASK, OUT, OUT], [
        ASK.target, OUT.target, ASK.target, OUT.target, ASK.target])
    assert found["intent_accuracy"].value == pytest.approx(2 / 3)
    assert (found["oos_recall"].value, found["oos_recall"].n) == (0.5, 2)
    assert "oos_recall" not in scores([ASK], [ASK.target])
    assert "intent_accuracy" not in scores([OUT], [OUT.target])


def test_other_tasks_count_texts_that_are_the_same() -> None:
    example = Example(task="redact", input="a", target="to [NAME]")
    assert scores([example] * 3, ["to [NAME]", " to [NAME]\n", "to [name]"])["exact"].value == (
        pytest.approx(2 / 3))


def test_flips_count_both_ways() -> None:
    assert flips([True, True, False, False], [True, False, True, False]).value == 0.5


@pytest.mark.parametrize("task", ["call", "intent"])
def test_a_wanted_call_that_is_none_is_refused_by_its_number(task: str) -> None:
    """No answer could be right, and a malformed one would look so."""
    check([PLAY, ASK, OUT, Example(task="redact", input="a", target="zebra")])
    with pytest.raises(DataError, match=f"example 2 of task {task}") as refused:
        check([PLAY, Example(task=task, input="zebra", target="zebra")])
    assert "zebra" not in str(refused.value)


def test_slots_of_a_recording_count_by_name_and_value() -> None:
    heard = Example(
        task="order", input="", files=(("audio", Path("a.flac")),),
        target=tool_call("order", [("size", "large"), ("milk", "oat"), ("milk", "soy")]))
    answers = [tool_call("order", [("milk", "oat"), ("size", "small")])]
    found = scores([heard], answers)
    assert found["slot_f1"].value == pytest.approx(2 * 1 / (3 + 2))
    assert found["intent_accuracy"].value == 1
    assert found["frame_exact"].value == 0
    assert scores([heard], [heard.target])["slot_f1"].value == 1


def test_a_frame_counts_as_it_is_said_whatever_cannot_be_heard() -> None:
    rated = call("Rate The 3 Willows a 4", "Rate", ("name", "The 3 Willows"), ("value", "4"))
    for answer, said in (
        (tool_call("Rate", [("name", "the three willows"), ("value", "four")]), 1),
        (tool_call("Rate", [("name", "the tree willows"), ("value", "four")]), 0),
        (tool_call("Book", [("name", "the three willows"), ("value", "four")]), 0),
        (tool_call("Rate", [("name", "the three willows")]), 0), ("?", 0), (rated.target, 1),
    ):
        found = scores([rated], [answer])
        assert found["frame_said"].value == said
        assert found["frame_exact"].value == (answer == rated.target)
    odd = call("x", "Rate", ("value", "#5.5 = *"))  # of which nobody knows how it is said
    assert scores([odd], [odd.target])["frame_said"].value == 1


def test_what_is_read_counts_by_its_characters_and_words() -> None:
    lines = [Example(task="read", input="", target=text) for text in ("Total 12.50", "Milk")]
    found = scores(lines, ["Total 12.60", "Milk\n"])
    assert found["exact"].value == 0.5
    assert found["cer"].value == pytest.approx(1 / 15)
    assert found["wer"].value == pytest.approx(1 / 3)
    assert scores(lines, ["", "a b c d"])["wer"].value == pytest.approx((2 + 4) / 3)
