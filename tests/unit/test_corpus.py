"""Whatever a data file looks like, its requests and answers are read as they are meant."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from cloister.corpus import (
    Example,
    load,
    normalized,
    overlap,
    read,
    refuse_overlap,
    split,
    tool_call,
)
from cloister.errors import DataError, OverlapError
from cloister.settings import Settings

SECRET = "zebra"  # stands for text of the data, which no message may show


def snips(folder: Path, intent: str, *requests: list[tuple[str, str | None]]) -> Path:
    rows = [
        {"data": [{"text": text} if slot is None else {"text": text, "entity": slot}
                  for text, slot in request]}
        for request in requests
    ]
    path = folder / f"train_{intent}.json"
    path.write_text(json.dumps({intent: rows}, ensure_ascii=False), "utf-8")
    return path


def test_a_request_becomes_a_tool_call_with_its_arguments_in_the_order_of_the_text(
    tmp_path: Path,
) -> None:
    path = snips(tmp_path, "GetWeather", [
        ("will it ", None), ("snow", "condition"), (" in ", None), ("Gibsland", "city"),
    ])
    (example,) = read(path)
    assert example == Example(
        task="call",
        input="will it snow in Gibsland",
        target='{"name": "GetWeather", "arguments": {"condition": "snow", "city": "Gibsland"}}',
    )


def test_a_slot_that_occurs_again_becomes_a_list_even_with_the_same_value(tmp_path: Path) -> None:
    path = snips(tmp_path, "Play", [
        ("one", "track"), (" by ", None), ("x", "artist"), (" then ", None), ("two", "track"),
        (" and ", None), ("one", "track"),
    ])
    arguments = json.loads(read(path)[0].target)["arguments"]
    assert arguments == {"track": ["one", "two", "one"], "artist": "x"}


def test_outer_spaces_of_requests_and_values_are_dropped(tmp_path: Path) -> None:
    (example,) = read(snips(tmp_path, "Play", [(" play ", None), (" jazz ", "genre")]))
    assert example.input == "play  jazz"
    assert json.loads(example.target)["arguments"] == {"genre": "jazz"}


def test_letters_beyond_ascii_are_written_as_themselves() -> None:
    assert tool_call("Add", [("list", "Cita Romántica")]) == (
        '{"name": "Add", "arguments": {"list": "Cita Romántica"}}'
    )


def test_a_directory_is_read_file_by_file_in_order_of_names(tmp_path: Path) -> None:
    snips(tmp_path, "B", [("second", None)])
    snips(tmp_path, "A", [("first", None)])
    assert [example.input for example in read(tmp_path)] == ["first", "second"]


def test_json_lines_come_back_as_written_line_separators_of_unicode_included(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"task": "a", "input": "b\u2028c\x85d", "target": "e"}\n\n'
        '{"task": "f", "input": "g", "target": "h"}\r\n', "utf-8",
    )
    assert read(path) == [
        Example(task="a", input="b\u2028c\x85d", target="e"),
        Example(task="f", input="g", target="h"),
    ]


@pytest.mark.parametrize("line", [
    "{", "[]", "3", '"x"', "null", "{}",
    f'{{"task": "a", "input": "{SECRET}"}}',
    f'{{"task": "a", "input": "{SECRET}", "target": 1}}',
    f'{{"task": "a", "input": "{SECRET}", "target": null}}',
    f'{{"task": "a", "input": "{SECRET} \\ud800", "target": "b"}}',
    "[" * 100_000,
])
def test_a_malformed_line_is_refused_by_number_without_its_text(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"task": "a", "input": "b", "target": "c"}\n' + line, "utf-8")
    with pytest.raises(DataError, match=r"Record 2 of own\.jsonl") as caught:
        read(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("row", [
    None, [], {}, {"data": None}, {"data": [SECRET]}, {"data": [{"entity": SECRET}]},
    {"data": [{"text": 1}]}, {"data": [{"text": SECRET, "entity": None}]},
    {"data": [{"text": SECRET, "entity": ["x"]}]}, {"data": [{"text": SECRET + "\ud800"}]},
])
def test_a_malformed_snips_record_is_refused_by_number_without_its_text(
    tmp_path: Path, row: object
) -> None:
    path = tmp_path / "train_X.json"
    path.write_text(json.dumps({"X": [{"data": [{"text": "fine"}]}, row]}), "utf-8")
    with pytest.raises(DataError, match=r"Record 2 of train_X\.json") as caught:
        read(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("content", [
    b"", b"[1]", b'{"A": [], "B": []}', b'{"A": 1}', b'{"A": {}}', b"{'A': []}", b"\xff\xfe",
    b"[" * 100_000,
])
def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(DataError, match=r"other\.json"):
        read(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["absent", "absent.jsonl"])
def test_a_missing_path_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_a_directory_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        read(tmp_path)


def test_no_request_shows_in_a_repr() -> None:
    assert SECRET not in repr(Example(task="call", input=SECRET, target=SECRET))


def test_equal_requests_never_straddle_the_split_whatever_their_case_and_spaces() -> None:
    examples = [
        Example(task="call", input=text, target=str(number))
        for number in range(400)
        for text in (f"request {number}", f" Request  {number}", f"REQUEST {number}\n")
    ]
    training, held_out = split(examples)
    assert len(training) + len(held_out) == len(examples)
    assert 0 < len(held_out) < 120
    assert not {e.target for e in training} & {e.target for e in held_out}
    assert split(reversed(examples))[1] == held_out[::-1]


def test_the_published_snips_files_are_read_whole() -> None:
    folder = Settings.from_environment().data
    if folder is None:
        pytest.skip("CLOISTER_DATA is not set")
    examples = read(folder / "snips")
    assert len(examples) == 13_784
    calls = [json.loads(example.target) for example in examples]
    assert len({call["name"] for call in calls}) == 7
    assert sum(any(isinstance(v, list) for v in call["arguments"].values()) for call in calls) == 61
    for example, call in zip(examples, calls, strict=True):
        for value in call["arguments"].values():
            for text in value if isinstance(value, list) else [value]:
                assert text in example.input


def clinc(folder: Path, **lists: list[object]) -> Path:
    path = folder / "clinc.json"
    path.write_text(json.dumps(lists), "utf-8")
    return path


def test_an_intent_is_answered_by_its_name_and_what_is_out_of_scope_by_none(
    tmp_path: Path,
) -> None:
    path = clinc(tmp_path, test=[["how much", "balance"]], oos_test=[["why", "oos"]])
    assert read(path) == [
        Example(task="intent", input="how much", target='{"name": "balance", "arguments": {}}'),
        Example(task="intent", input="why", target='{"name": "none", "arguments": {}}'),
    ]
    assert [example.input for example in read(path, parts=("oos_test",))] == ["why"]
    with pytest.raises(DataError, match="no examples"):
        read(path, parts=("train",))


def test_of_a_clinc_file_that_holds_all_parts_each_purpose_takes_its_own(tmp_path: Path) -> None:
    rows = {part: [[f"{part} it", "x"]] for part in ("train", "val", "test", "oos_val")}

    def inputs(examples: Iterable[Example]) -> list[str]:
        return [example.input for example in examples]

    path = clinc(tmp_path, **rows)
    assert inputs(read(path)) == ["test it"]
    assert inputs(load(path).examples) == ["train it"]
    del rows["test"]
    assert inputs(read(clinc(tmp_path, **rows))) == ["val it", "oos_val it"]
    assert inputs(read(clinc(tmp_path, train=rows["train"]))) == ["train it"]
    assert inputs(load(clinc(tmp_path, mine=rows["train"])).examples) == ["train it"]


def test_questions_on_tales_are_no_tales_and_no_flaws(tmp_path: Path) -> None:
    tale = {"sections": ["Once there was a fox. It ran."]}
    question = {"story": "the-fox", "sections": "1", "question": "Who ran?", "answers": ["a fox"]}
    path = tmp_path / "all.jsonl"
    path.write_text(f"{json.dumps(tale)}\n{json.dumps(question)}\n", "utf-8")
    assert len(read(path)) == 1
    assert not load(path).flaws


@pytest.mark.parametrize("row", [[], ["x"], ["x", "y", "z"], [1, "y"], ["x", 2], ["\ud800", "y"]])
def test_a_malformed_clinc_record_is_refused_by_number(tmp_path: Path, row: list[object]) -> None:
    with pytest.raises(DataError, match=r"Record 2 of clinc\.json"):
        read(clinc(tmp_path, train=[["a", "b"]], val=[row]))


def test_a_section_of_a_tale_is_continued_from_its_first_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tales.jsonl"
    sections = ['"It is cold!" said he. Then it snowed. All day.', "One sentence only."]
    path.write_text(json.dumps({"story": "S", "sections": sections}), "utf-8")
    assert read(path) == [Example(
        task="story", input='"It is cold!"', target="said he. Then it snowed. All day.")]


def test_what_cannot_be_trained_on_is_left_out_counted_and_named_by_line(tmp_path: Path) -> None:
    good = [f'{{"task": "a", "input": "{SECRET} {i}", "target": "c"}}' for i in range(96)]
    lines = [*good[:10], "{", *good[10:20], "", *good[20:], good[0],
             '{"task": "a", "input": " ", "target": "c"}']
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    corpus = load(path)
    assert len(corpus.examples) == 96
    assert [str(flaw) for flaw in corpus.flaws] == [
        "own.jsonl:11 malformed", "own.jsonl:22 blank", "own.jsonl:99 duplicate",
        "own.jsonl:100 empty",
    ]
    assert corpus.count() == {"malformed": 1, "blank": 1, "duplicate": 1, "empty": 1}
    with pytest.raises(DataError, match=r"Of 100 records 4 .*own\.jsonl:11 malformed") as caught:
        load(path, tolerated=0.03)
    assert SECRET not in str(caught.value)


def test_a_record_without_request_or_answer_is_refused_where_scores_are_made(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"task": "a", "input": "b", "target": "  "}')
    with pytest.raises(DataError, match=r"Record 1 of own\.jsonl is empty"):
        read(path)


def test_repeated_requests_count_as_often_as_they_stand_where_scores_are_made(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"task": "a", "input": "b", "target": "c"}\n' * 3)
    assert len(read(path)) == 3
    assert len(load(path, tolerated=0.9).examples) == 1


def test_evaluation_requests_in_the_training_data_are_found_however_they_are_spelled() -> None:
    training = [Example(task="a", input="Play  some JAZZ, please!", target="x")]
    same = Example(task="a", input="play some jazz please", target="y")
    other = Example(task="b", input="play some jazz please", target="y")
    assert normalized("\uff30lay ca\u0301fe") == normalized("play c\u00e1fe")
    # Vowel signs are letters of their word, and a symbol may be all that there is.
    for one, two in (("\u0926\u093e\u092e \u0915\u0940", "\u0926\u093e\u092e \u0915\u093e"),
                     ("\U0001f3b5", "\U0001f44d!"), ("+", "-")):
        assert normalized(one) != normalized(two)
    assert overlap(training, [same, same, other]) == 2
    refuse_overlap(training, [other])
    with pytest.raises(OverlapError, match="2 of 3 evaluation requests") as caught:
        refuse_overlap(training, [same, same, other])
    assert "jazz" not in str(caught.value)


def test_the_published_clinc_and_fairytale_files_are_read_whole() -> None:
    folder = Settings.from_environment().data
    if folder is None:
        pytest.skip("CLOISTER_DATA is not set")
    file = folder / "clinc150" / "train_val.json"
    intents = read(file, parts=("train", "val", "oos_train", "oos_val"))
    assert len(intents) == 18_200
    assert len({example.target for example in intents}) == 151
    assert len(read(folder / "clinc150")) == 3_100
    assert len(load(folder / "clinc150").examples) > 15_000
    assert len(read(folder / "fairytaleqa")) > 3_000
    tales = read(folder / "fairytaleqa" / "stories_train.jsonl")
    assert len(tales) > 3000
    assert sum(len(example.target) for example in tales) > 2_000_000
