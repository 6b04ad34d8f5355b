"""What is written becomes what is said, or is left out where that is not certain."""

import pytest

from cloister.evaluate.transcript import said, words


@pytest.mark.parametrize(("written", "heard"), [
    ("Play something from 1998", "play something from nineteen ninety eight"),
    ("the year 2005", "the year two thousand five"),
    ("the 1900s", "the nineteen hundreds"),
    ("music of the 60s", "music of the sixties"),
    ("a table for 12 at 7:05 pm", "a table for twelve at seven oh five pm"),
    ("at 8:00", "at eight o'clock"),
    ("my 21st, 3rd and 30th", "my twenty first third and thirtieth"),
    ("Beyonc\u00e9 & Ch\u0129", "beyonce and chi"),
    ("rock\u2019n roll's best\u2014ever!", "rock'n roll's best ever"),
    ("volume 325", "volume three hundred twenty five"),
])
def test_numbers_signs_and_accents_are_read_as_people_do(written: str, heard: str) -> None:
    text = said(written)
    assert text is not None
    assert words(text) == heard


@pytest.mark.parametrize(
    "written", ["", "2.5 stars", "$20", "0012", "123456", "\u4f60\u597d", "..."])
def test_what_could_be_read_in_several_ways_is_not_read_at_all(written: str) -> None:
    assert said(written) is None


def test_pauses_stay_for_the_voice_and_are_not_heard() -> None:
    assert said("Hi ,  a mocha ,please") == "Hi, a mocha,please"
    assert words("Hi, a mocha,please") == "hi a mocha please"
