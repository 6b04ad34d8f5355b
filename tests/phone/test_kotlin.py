"""The glue for Android, compiled and run on the JVM, with the stock runner behind LlmModule."""

from __future__ import annotations

import fcntl
import json
import os

import pytest
from tests.phone import kotlin_glue
from tests.phone.kotlin_glue import Trial

from cloister.bundle import Bundle
from cloister.embed.facts import facts_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(kotlin_glue.missing()),
                       reason=f"this machine lacks {kotlin_glue.missing()}"),
]


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """What the trial found, which takes half a minute: once for all processes of a run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    shared = tmp_path_factory.getbasetemp().parent / f"kotlin-{run}.json"
    with shared.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not text:
            try:
                kotlin_glue.compiler()
            except RuntimeError as reason:
                pytest.skip(str(reason))
            found = kotlin_glue.trial(Bundle.open("nano-1"), tmp_path_factory.mktemp("kotlin"))
            text = json.dumps(found)
            file.write(text)
    return dict(json.loads(text))


def test_nothing_in_the_trial_failed(trial: Trial) -> None:
    assert [found["error"] for found in trial.values() if "error" in found] == []


def test_an_answer_streams_and_is_the_golden_one_without_the_end_token(trial: Trial) -> None:
    found = trial["streams"]
    pieces = found["pieces"].split("|")
    assert found["streamed"] == "true"  # the first piece was there before the second was made
    assert len(pieces) > 3
    assert "".join(pieces) == trial["golden"]["answer"].removesuffix("<|end|>")
    assert found["end"] == "ENDED"


def test_the_first_start_shows_progress_and_checks_itself_once(trial: Trial) -> None:
    assert trial["streams"]["stages"] == "HASH LOAD CHECK"
    assert trial["streams"]["last"] == "CHECK 1.0"
    assert trial["streams"]["again"] == "0"  # prompts at the second start


@pytest.mark.parametrize("scenario", ["ended", "limited", "first", "split", "split-limited"])
def test_a_conversation_goes_on_as_if_it_were_read_at_once(trial: Trial, scenario: str) -> None:
    found = trial[scenario]
    assert found["read"] == "true"  # the conversation, and nothing twice
    assert found["whole"].endswith("<|end|>")
    assert found["second"] + "<|end|>" == found["whole"]


def test_a_later_turn_sends_only_what_the_model_has_not_read(trial: Trial) -> None:
    turn = "<|end|><|user|>Again?<|end|><|assistant|>"
    assert trial["ended"]["sent"] == turn
    last = trial["limited"]["pieces"].split("|")[-1]
    assert trial["limited"]["sent"] == last + turn  # its last token was never read
    assert trial["first"]["sent"] == turn  # at a first piece the runner forgets the stop


def test_a_limit_counts_pieces(trial: Trial) -> None:
    for scenario, limit in (("limited", 3), ("first", 1)):
        assert len(trial[scenario]["pieces"].split("|")) == limit
        assert trial[scenario]["end"] == "LIMIT"


def test_a_character_of_two_tokens_comes_whole(trial: Trial) -> None:
    assert trial["split"]["pieces"].split("|")[0] == "é"
    assert trial["split"]["end"] == "ENDED"
    assert trial["split-limited"]["pieces"] == "é"
    # Its halves were read, and half a piece cannot be sent: the conversation is read again.
    assert trial["golden"]["ask"] in trial["split-limited"]["sent"]


def test_an_answer_stops_in_the_middle_and_the_next_is_asked(trial: Trial) -> None:
    assert trial["stops"]["end"] == "STOPPED"
    assert len(trial["stops"]["pieces"].split("|")) == 3
    assert trial["stops"]["taken"] == "2"  # of a flow that is collected no further
    assert trial["stops"]["next"] == "ENDED"


def test_asking_twice_at_once_is_refused_and_the_first_goes_on(trial: Trial) -> None:
    assert trial["twice"]["say"].startswith("Busy: ")
    assert trial["twice"]["reset"].startswith("Busy: ")
    assert trial["twice"]["end"] == "Finished(end=ENDED)"


def test_closing_stops_and_lets_go_once(trial: Trial) -> None:
    assert trial["closes"]["end"] == "Finished(end=STOPPED)"
    assert trial["closes"]["closed"] == "1"
    assert trial["closes"]["say"].startswith("Closed: ")


def test_the_contexts_end_has_a_name_and_reset_begins_anew(trial: Trial) -> None:
    found = trial["fills"]
    assert found["first"].startswith("PromptTooLong: ")
    assert "1024 tokens" in found["first"]
    assert (found["end-middle"], found["after"]) == ("CONTEXT_FULL", "CONTEXT_FULL")
    assert found["pieces-middle"]  # what was said until then
    assert (found["end-turn"], found["pieces-turn"]) == ("CONTEXT_FULL", "")
    assert found["short"] == "LIMIT"  # a shorter turn still fits
    assert found["short-read"] == "false"  # and what did not is gone, however much was read of it
    assert found["end-reset"] == "ENDED"
    assert found["pieces-reset"] == trial["streams"]["pieces"]


def test_everything_else_is_refused_by_name_without_what_was_typed(trial: Trial) -> None:
    found = trial["refuses"]
    assert {name: text.partition(":")[0] for name, text in found.items() if name != "text"} == {
        "special": "SpecialToken", "special-system": "SpecialToken", "system": "NoSystemPrompt",
        "release": "ReleaseDiffers", "memory": "NotEnoughMemory", "golden": "AnswerDiffers",
        "golden-again": "AnswerDiffers", "byte-program.xnnpack.pte": "FileDiffers",
        "byte-tokenizer.json": "FileDiffers", "missing": "FileMissing", "junk": "RunnerFailed",
        "limit": "OutOfRange", "temperature": "OutOfRange",
    }
    assert "1.4.1" in found["release"] and "1.3.0" in found["release"]
    needed = facts_of(Bundle.open("nano-1")).memory_bytes
    assert str(needed) in found["memory"] and " 1000 " in found["memory"]
    assert "tokenizer.json" in found["byte-tokenizer.json"]
    assert not any("secret" in text for each in trial.values() for text in each.values())


def test_texts_come_through_the_constants_unchanged(trial: Trial) -> None:
    assert trial["refuses"]["text"] == kotlin_glue.ODD


def test_files_are_copied_whole_or_not_at_all(trial: Trial) -> None:
    found = trial["copies"]
    assert found["stages"] == "COPY 1.0"
    assert found["old"] == "false"  # the model of an earlier release
    assert found["free"] == "2800000000"  # without what the system keeps
    assert found["wrong"].startswith("FileDiffers: ")
    assert found["files"] == "program.xnnpack.pte tokenizer.json"


def test_a_pack_of_play_is_waited_for(trial: Trial) -> None:
    found = trial["fetches"]
    assert (found["stages"], found["asked"], found["left"]) == ("COPY 0.25", "1", "0")
    assert found["failed"].startswith("PackFailed: ")
    assert "-6" in found["failed"]
