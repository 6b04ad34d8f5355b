"""What was answered is scored by the highest column, looked up by token, and gone on from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.jupyter.test_runs import Heard, asked, columns

from cloister import family
from cloister.bundle import Bundle
from cloister.errors import EngineBusy, SettingError
from cloister.runtime.chat import Ask, Sampling
from cloister.runtime.client import Worker
from cloister.tokenizer import Tokenizer
from cloister_jupyter.events import Branched, Delta, Ended, Over, Refused, Resumed, Scored, Unscored
from cloister_jupyter.runs import Probed, Runs
from cloister_jupyter.spelling import Spelling

HIGH, LOW = family.bundle_path("nano-2"), family.bundle_path("nano-1")
WILD = {"sampling": Sampling(temperature=9.0, seed=1), "max_tokens": 480}


@pytest.fixture(scope="module")
def shared() -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        runs = Runs(columns(HIGH, LOW), lambda event: None)
        yield runs
        runs.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def two(shared: Runs, heard: Heard) -> Runs:
    shared._tell = heard
    return shared


def scores(heard: Heard, column: str, by: str) -> list[tuple[float, int]]:
    events = [each for each in heard.of(Scored, column) if each.by == by]
    assert [each.at for each in events] == [
        sum(len(each.ranks) for each in events[:number]) for number in range(len(events))]
    return [pair for each in events for pair in zip(each.logprobs, each.ranks, strict=True)]


def test_answers_are_scored_as_they_were_given_and_lower_ones_by_the_highest_column(
    two: Runs, heard: Heard
) -> None:
    two.begin(asked("0", "1"))
    assert two.wait(60)
    two.score("r")
    assert two.wait(60)
    last = two.last
    assert last is not None and last.reference == "0"
    for id_ in "01":
        given = [(token.logprob, token.rank) for token in last.answers[id_].tokens]
        assert [rank for _, rank in scores(heard, id_, id_)] == [rank for _, rank in given]
        assert [value for value, _ in scores(heard, id_, id_)] == pytest.approx(
            [value for value, _ in given], rel=0.01, abs=0.001)
    with Worker(HIGH, threads=1, vault=False) as worker:
        forced = tuple(token.id for token in last.answers["1"].tokens)
        wanted = list(worker.session(system="call").answer(Ask.of(
            "wake me up at eight", forced=forced, max_tokens=len(forced), top=5)))
    assert scores(heard, "0", "1") == []
    assert [value for value, _ in scores(heard, "1", "0")] == pytest.approx(
        [token.logprob for token in wanted], rel=0.02, abs=0.05)
    seen = [event.seq for event in heard.events]
    assert seen == list(range(len(seen)))  # one run, whatever is asked of it
    assert [event.scores for event in heard.of(Resumed)] == [True]
    two.score("r")  # all of it is known
    assert two.wait(60)
    assert scores(heard, "1", "0") and len(heard.of(Scored)) == 3


def test_scoring_stops_and_goes_on_where_it_was(
    two: Runs, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister_jupyter.answers._PART", 8)
    two.begin(asked(
        "0", "1", prompt="once upon a time there was a king", system="story", **WILD))
    assert two.wait(60)
    heard.events.clear()
    original = two._tell

    def stop(event: object) -> None:
        original(event)  # type: ignore[arg-type]
        if isinstance(event, Scored) and event.by == "0" != event.column:
            two.stop("r")

    last = two.last
    assert last is not None
    last._tell = stop
    two.score("r")
    assert two.wait(60)
    told = len(scores(heard, "1", "0"))
    count = len(last.answers["1"].tokens)
    assert 0 < told < count > 400 and heard.of(Over)[-1].stopped
    last._tell = heard
    two.score("r")
    assert two.wait(60)
    found = scores(heard, "1", "0")
    assert len(found) == count == len(last.answers["1"].scores)
    assert max(rank for _, rank in found) > 100 and not heard.of(Over)[-1].stopped


def test_a_branch_goes_on_from_another_token_with_figures_of_its_own_and_is_scored(
    two: Runs, heard: Heard
) -> None:
    two.begin(asked("0", "1"))
    assert two.wait(60)
    (row, *_) = two.likeliest("r", "1", 2, 3)
    other = row[0].top[1][0]
    two.branch("r", "1", 2, other)
    assert two.wait(60)
    last = two.last
    assert last is not None
    first, branch = last.answers["1"].tokens, last.answers["1.0"].tokens
    assert [token.id for token in branch[:3]] == [first[0].id, first[1].id, other]
    assert branch[2].rank == 2 and heard.text("1.0") == "".join(token.text for token in branch)
    (ended,) = heard.of(Ended, "1.0")
    assert (ended.forced_tokens, ended.tokens) == (3, len(branch))
    assert heard.of(Ended, "1")[0].forced_tokens == 0
    assert [(each.parent, each.at) for each in heard.of(Branched)] == [("1", 2)]
    two.branch("r", "1.0", 1, branch[1].top[2][0])
    assert two.wait(60)
    assert heard.of(Branched)[-1].column == "1.1" and heard.of(Ended, "1.1")
    two.score("r")
    assert two.wait(60)
    assert len(scores(heard, "1.1", "0")) == len(last.answers["1.1"].tokens)


def test_what_is_no_token_of_the_last_run_is_refused(two: Runs, heard: Heard) -> None:
    two.begin(asked("1", run="now"))
    assert two.wait(60)
    for run, column, at, id_ in (("r", "1", 0, 1), ("now", "0", 0, 1), ("now", "1", 999, 1),
                                 ("now", "1", -1, 1), ("now", "1", 0, -1)):
        with pytest.raises(SettingError):
            two.branch(run, column, at, id_)
    with pytest.raises(SettingError, match="run the request again"):
        two.score("r")
    with pytest.raises(SettingError, match="run it again"):
        two.likeliest("now", "0", 0, 5)
    assert two.likeliest("now", "1", 900, 950) == []
    two.branch("now", "1", 0, 10**6)
    assert two.wait(60)
    assert "below 4096" in heard.of(Refused, "1.0")[0].message
    two.begin(asked("1", run="x", **WILD))
    heard.wait(lambda: [event for event in heard.of(Delta) if event.run == "x"])
    with pytest.raises(EngineBusy):
        two.score("x")
    two.stop()
    assert two.wait(20)


def test_tokens_of_another_tokenizer_cannot_be_scored_and_the_column_says_so(
    two: Runs, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.begin(asked("0", "1"))
    assert two.wait(60)
    monkeypatch.setattr("cloister_jupyter.runs._tokenizer", lambda column: column.id)
    two.score("r")
    assert two.wait(60)
    (unscored,) = heard.of(Unscored)
    assert (unscored.column, unscored.by) == ("1", "0")
    assert "c0 has another tokenizer than c1" in unscored.message
    assert scores(heard, "1", "1") and not scores(heard, "1", "0")


def test_running_processes_try_to_reach_out_and_where_none_runs_a_bare_one(
    two: Runs, heard: Heard
) -> None:
    for running in (True, False):
        if running:
            two.begin(asked("1"))
            assert two.wait(60)
        else:
            two.close()
        told: list[Probed] = []
        done = threading.Event()
        two.probe(lambda probed, told=told, done=done: (told.append(probed), done.set()))  # type: ignore[misc]
        assert done.wait(30) and not told[0].failed
        assert ("c1" in told[0].attempts) is running
        assert all(each.refused for tried in told[0].attempts.values() for each in tried)


@pytest.mark.parametrize("bundle", [LOW])
def test_the_texts_of_single_tokens_are_those_that_stand_in_an_answer(bundle: Path) -> None:
    found, spelling = Bundle.open(bundle), Spelling(bundle)
    tokenizer = Tokenizer.from_files(
        found.tokenizer_path, found.template_path, found.manifest)
    for text in ("the quick brown fox, 12 times", '{"name": "play", "arguments": {}}', "a\n\n b"):
        assert "".join(map(spelling.text, tokenizer.encode(text))) == text
    (byte, *_) = tokenizer.encode("\U0001f9ff")
    assert spelling.text(byte) == "\ufffd"  # part of a character
    assert all(spelling.text(id_) for id_ in found.manifest.eos)
