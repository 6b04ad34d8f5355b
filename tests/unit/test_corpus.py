"""Whatever a data file looks like, its requests and answers are read as they are meant."""

import json
from pathlib import Path

import pytest

from cloister.corpus import Example, read, split, tool_call
from cloister.errors import DataError
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
        '{"task": "f", "input": "g", "target": ""}\r\n', "utf-8",
    )
    assert read(path) == [
        Example(task="a", input="b\u2028c\x85d", target="e"),
        Example(task="f", input="g", target=""),
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
    with pytest.raises(DataError, match=r"Line 2 of own\.jsonl") as caught:
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
    b"", b"[1]", b'{"A": [], "B": []}', b'{"A": 1}', b"{'A': []}", b"\xff\xfe", b"[" * 100_000,
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
