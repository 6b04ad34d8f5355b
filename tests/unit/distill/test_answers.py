"""A teacher answers requests that nobody answered."""

from __future__ import annotations

import json

import pytest

from cloister.corpus import Example
from cloister.distill.answers import answered
from cloister.model.checkpoint import Checkpoint
from cloister.reference import checkpoint_path

REQUESTS = [
    Example(task="call", input=text, target="zebra", place=f"mine:{number}")
    for number, text in enumerate(("will it rain in Boston tomorrow", "play some jazz"), start=1)]


@pytest.fixture(scope="module")
def teacher() -> Checkpoint:
    return Checkpoint.open(checkpoint_path("nano-1"))


def test_each_request_is_answered_in_its_order_and_its_target_is_not_read(
    teacher: Checkpoint
) -> None:
    found = answered(teacher, REQUESTS)
    assert [json.loads(each.target)["name"] for each in found] == ["GetWeather", "PlayMusic"]
    assert [(each.task, each.input, each.place) for each in found] == [
        (each.task, each.input, each.place) for each in REQUESTS]


def test_an_answer_without_an_end_teaches_nothing(teacher: Checkpoint) -> None:
    assert answered(teacher, REQUESTS, limit=2) == []


def test_sampled_answers_are_those_of_their_seed(teacher: Checkpoint) -> None:
    one, same, other = (
        answered(teacher, REQUESTS * 4, temperature=2.0, seed=seed, limit=64) for seed in (1, 1, 2))
    assert one == same
    assert one != other
