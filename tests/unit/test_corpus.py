"""Whatever a data file looks like, its requests and answers are read as they are meant."""

import codecs
import gzip
import json
import os
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from cloister import formats
from cloister.corpus import (
    LEARN,
    MEASURE,
    Example,
    Split,
    load,
    normalized,
    overlap,
    read,
    refuse_overlap,
    select,
    split,
    tool_call,
)
from cloister.errors import DataError, OverlapError, SettingError
from cloister.message import Message
from cloister.parts import Audio, Image
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


def test_a_share_is_the_same_by_its_seed_and_part_of_a_larger_one() -> None:
    examples = [Example(task="a", input=f"request {number}", target="b") for number in range(1000)]
    few, more = (set(split(examples, held_out=share, seed=7)[1]) for share in (0.05, 0.25))
    assert few < more
    assert 30 < len(few) < 75 < 200 < len(more) < 300
    assert set(split(examples, held_out=0.05, seed=8)[1]) != few


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
    with pytest.raises(DataError, match=r"no split train \(test: clinc\.json\)"):
        read(path, split=Split.TRAIN)


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
    with pytest.raises(DataError, match="--split validate or --split test"):
        load(clinc(tmp_path, val=rows["val"], test=rows["val"]))


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
    assert "Malformed: it is in none of the formats, SNIPS" in str(caught.value)


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
    intents = [*read(file, split=Split.TRAIN), *read(file, split=Split.VALIDATE)]
    assert len(intents) == 18_200
    assert len({example.target for example in intents}) == 151
    assert len(read(folder / "clinc150")) == 3_100
    assert len(load(folder / "clinc150").examples) > 15_000
    assert len(read(folder / "fairytaleqa")) == 376
    tales = read(folder / "fairytaleqa" / "stories_train.jsonl")
    assert len(tales) > 3000
    assert sum(len(example.target) for example in tales) > 2_000_000


def said(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)


def records(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


SYSTEM, ASKED, ANSWERED, AGAIN, LAST = (
    ("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"),
    ("assistant", "farewell"))
CONVERSATION = [
    Example(task="chat", input="hi", target="hello", turns=said(SYSTEM, ASKED)),
    Example(task="chat", input="bye", target="farewell",
            turns=said(SYSTEM, ASKED, ANSWERED, AGAIN)),
]


@pytest.mark.parametrize("record", [
    {"messages": [{"role": role, "content": text}
                  for role, text in (SYSTEM, ASKED, ANSWERED, AGAIN, LAST)]},
    {"messages": [{"role": role, "content": [{"type": "text", "text": text}]}
                  for role, text in (SYSTEM, ASKED, ANSWERED, AGAIN, LAST, AGAIN)]},
    {"id": "x", "tools": "[]", "conversations": [
        {"from": name, "value": text} for name, text in zip(
            ("system", "human", "gpt", "human", "gpt"),
            ("be brief", "hi", "hello", "bye", "farewell"), strict=True)]},
    {"conversations": [
        {"from": name, "value": text} for name, text in zip(
            ("System", "Human", "model", "User", "GPT"),
            ("be brief", "hi", "hello", "bye", "farewell"), strict=True)]},
    {"system": "be brief", "conversations": [
        {"role": role, "content": text} for role, text in (ASKED, ANSWERED, AGAIN, LAST)]},
    {"system": "be brief", "instruction": "bye", "input": "", "output": "farewell",
     "history": [["hi", "hello"]]},
    {"system_prompt": "be brief", "instruction": "bye", "context": "", "response": "farewell",
     "history": [["hi", "hello"]]},
    {"system": "be brief", "messages": [
        {"role": role, "content": text, "reasoning_content": None, "weight": 1}
        for role, text in (SYSTEM, ASKED, ANSWERED, AGAIN, LAST)]},
])
def test_each_answer_of_a_conversation_is_an_example_whatever_the_fields_are_called(
    tmp_path: Path, record: dict[str, object]
) -> None:
    examples = read(records(tmp_path / "chat.jsonl", record))
    assert examples == CONVERSATION
    assert examples[1].messages == said(SYSTEM, ASKED, ANSWERED, AGAIN)
    assert examples[1].place == "chat.jsonl:1"


def test_an_instruction_and_its_input_are_one_request(tmp_path: Path) -> None:
    path = records(tmp_path / "alpaca.jsonl",
                   {"instruction": "translate", "input": "chat", "output": "cat"},
                   {"instruction": "greet", "output": "hello"},
                   {"instruction": "sum up", "context": "a tale", "response": "short"})
    assert [each.messages for each in read(path)] == [
        said(("user", "translate\n\nchat")), said(("user", "greet")),
        said(("user", "sum up\n\na tale"))]


def test_a_task_is_the_system_message_unless_it_is_empty() -> None:
    assert Example(task="call", input="go", target="x").messages == said(
        ("system", "call"), ("user", "go"))
    assert Example(task="", input="go", target="x").messages == said(("user", "go"))


@pytest.mark.parametrize("mark", [
    {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}])
def test_an_answer_without_weight_is_read_and_not_taught(
    tmp_path: Path, mark: dict[str, object]
) -> None:
    messages = [{"role": role, "content": text} for role, text in (ASKED, ANSWERED, AGAIN, LAST)]
    messages[1] |= mark
    (example,) = read(records(tmp_path / "chat.jsonl", {"messages": messages}))
    assert example.messages == said(ASKED, ANSWERED, AGAIN)


def test_what_an_example_is_written_as_is_read_as_it(tmp_path: Path) -> None:
    examples = [*CONVERSATION, Example(task="a", input="b", target="c")]
    assert read(records(tmp_path / "x.jsonl", *(each.to_dict() for each in examples))) == examples


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": SECRET}


@pytest.mark.parametrize(("record", "kind"), [
    ({"messages": []}, "malformed"),
    ({"messages": None}, "malformed"),
    ({"messages": [SECRET]}, "malformed"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "malformed"),
    ({"messages": [USER, {"role": "narrator", "content": SECRET}]}, "malformed"),
    ({"messages": [USER, {"role": ["user"], "content": SECRET}]}, "malformed"),
    ({"messages": [USER, {"role": "system", "content": SECRET}, ASSISTANT]}, "malformed"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "malformed"),
    ({"messages": [USER]}, "empty"),
    ({"messages": [ASSISTANT]}, "empty"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty"),
    ({"messages": [{"role": "user", "content": ""}, ASSISTANT]}, "empty"),
    ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}, "with tools"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "with tools"),
    ({"messages": [USER, {"role": "tool", "content": SECRET}, ASSISTANT]}, "with tools"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "weighted"),
    ({"messages": [USER, {**ASSISTANT, "weight": "0"}]}, "weighted"),
    ({"messages": [USER, {**ASSISTANT, "train_detail": [{"train": False}]}]}, "weighted"),
    ({"messages": [USER, {**ASSISTANT, "reasoning_content": SECRET}]}, "with reasoning"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": SECRET}]}, "malformed"),
    ({"instruction": SECRET}, "malformed"),
    ({"instruction": 1, "output": SECRET}, "malformed"),
    ({"instruction": "a", "output": SECRET, "history": [[SECRET]]}, "malformed"),
    ({"instruction": "a", "output": SECRET + "\ud800"}, "malformed"),
])
def test_a_conversation_that_cannot_be_used_is_named_by_its_line_and_kind_without_its_text(
    tmp_path: Path, record: dict[str, object], kind: str
) -> None:
    path = records(tmp_path / "chat.jsonl", {"messages": [USER, ASSISTANT]}, record)
    assert [str(flaw) for flaw in load(path, tolerated=1).flaws] == [f"chat.jsonl:2 {kind}"]
    with pytest.raises(DataError, match=f"Record 2 of chat.jsonl is {kind}") as caught:
        read(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("record", [
    {"task": "chat", "input": "hi"}, {"task": "chat", "input": "hi", "target": ""},
    {"messages": [{"role": "user", "content": "hi"}]}, {"instruction": "hi", "output": ""},
])
def test_a_request_without_an_answer_is_read_where_none_is_needed(
    tmp_path: Path, record: dict[str, object]
) -> None:
    path = records(tmp_path / "asked.jsonl", record)
    (example,) = load(path, answered=False).examples
    assert (example.messages[-1], example.target) == (said(("user", "hi"))[0], "")
    assert [flaw.kind for flaw in load(path, tolerated=1).flaws] == ["empty"]


def test_a_conversation_never_straddles_the_split_and_counts_as_asked_only_as_a_whole() -> None:
    one, other = (
        [Example(task="chat", input=text, target="x", turns=said(*before, ("user", text)))
         for before, text in (((), first), ((("user", first), ANSWERED), "go on"))]
        for first in ("tell a tale", "tell a joke"))
    for parts in (split([*one, *other], held_out=share / 10) for share in range(11)):
        assert all(len({example in part for example in conversation}) == 1
                   for part in parts for conversation in (one, other))
    assert overlap(one, other) == 0
    assert overlap([*one, *other], other) == 2


LINE = b'{"task": "a", "input": "b", "target": "c"}'
ONE = [Example(task="a", input="b", target="c")]


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", codecs.BOM_UTF8 + LINE),
    ("a.jsonl", LINE + b"\r\n"),
    ("a.jsonl", codecs.BOM_UTF8 + LINE + b"\r\n\r\n"),
    ("a.JSONL", LINE),
    ("a.ndjson", LINE),
    ("a.json", LINE),
    ("a.json", codecs.BOM_UTF8 + b"[" + LINE + b"]"),
    ("a.JSON", b"[\r\n" + LINE + b"\r\n]\r\n"),
    ("a.jsonl", b"[\n" + LINE + b"\n]\n"),
    ("a.json", b'{"anything": [' + LINE + b"]}"),
    ("a.txt", LINE),
    ("a.jsonl.gz", gzip.compress(codecs.BOM_UTF8 + LINE, mtime=0)),
    ("a.json.gz", gzip.compress(b"[" + LINE + b"]", mtime=0)),
    ("a.jsonl", gzip.compress(LINE, mtime=0)),
    ("a.jsonl.gz", LINE),
])
def test_a_file_is_read_however_it_was_saved(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ONE
    assert load(tmp_path / name).flaws == ()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_as_any_system_ends_them_and_count_alike(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(end.join([LINE, b"", b"{", LINE, b""]))
    corpus = load(tmp_path / "a.jsonl", tolerated=1)
    assert list(corpus.examples) == ONE
    assert [str(flaw) for flaw in corpus.flaws] == [
        "a.jsonl:2 blank", "a.jsonl:3 malformed", "a.jsonl:4 duplicate"]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_is_not_tolerated(tmp_path: Path, share: float) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    with pytest.raises(SettingError, match="between 0 and 1"):
        load(tmp_path / "a.jsonl", tolerated=share)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines_of_several_files_put_together_are_read_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((codecs.BOM_UTF8 + LINE + b"\r\n") * 2 + LINE)
    assert read(tmp_path / name) == ONE * 3


@pytest.mark.parametrize(("content", "told"), [
    (LINE.decode().encode("utf-16"), "UTF-16; save it as UTF-8.*iconv -f utf-16"),
    (LINE.decode().encode("utf-16-be"), "UTF-16"),
    (LINE.decode().encode("utf-32"), "UTF-32"),
    (b'{"task": "caf\xe9", "input": "b", "target": "c"}', "not UTF-8.*iconv"),
    (gzip.compress(LINE, mtime=0)[:-9], "no whole gzip file"),
    (gzip.compress(LINE, mtime=0)[:-8] + bytes(8), "no whole gzip file"),
    (b"\x1f\x8b", "no whole gzip file"),
    (b"PK\x03\x04" + bytes(range(256)), "packed or in a binary format"),
    (b"PAR1" + bytes(range(256)), "packed or in a binary format"),
    (gzip.compress(b"BZh91AY&SY", mtime=0), "packed or in a binary format"),
    (b"", "holds no examples"),
    (b"\n\n", "holds no examples"),
    (b"[]", "holds no examples"),
    (b"{}", "holds no examples"),
])
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(
    tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json .*{told}"):
        read(tmp_path / "a.json")


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "UNPACKED_BYTES", 1 << 20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(64 << 20), mtime=0))
    (tmp_path / "plain.jsonl").write_bytes(LINE + b"\n" + b" " * (2 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz unpacks to more than 1 MiB"):
        read(tmp_path / "bomb.jsonl.gz")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert len(read(tmp_path / "plain.jsonl")) == 1


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        records(path / name, {"task": "a", "input": name, "target": "c"})
    return path


def test_every_file_of_data_in_a_folder_is_read_and_the_rest_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", "a.jsonl", "b.ndjson", "c.JSONL", "d.json", "d.json.GZ",
                  "notes.txt", ".hidden.jsonl")
    (path / "more").mkdir()
    os.mkfifo(path / "pipe.jsonl")  # which would be waited for
    assert [each.input for each in read(path)] == ["a.jsonl", "b.ndjson", "c.JSONL", "d.json"]
    selection = select(path, MEASURE)
    assert selection.to_dict() == {
        "files": ["a.jsonl", "b.ndjson", "c.JSONL", "d.json"], "split": None,
        "left_out": {
            "d.json.GZ": "also in d.json", "more": "a folder", "notes.txt": "no data file",
            "pipe.jsonl": "no regular file"}}
    assert str(selection) == (
        "a.jsonl, b.ndjson, c.JSONL, d.json; left out: d.json.GZ (also in d.json), more "
        "(a folder), notes.txt (no data file), pipe.jsonl (no regular file)")


def test_a_folder_of_folders_is_refused_by_their_names(tmp_path: Path) -> None:
    folder(folder(tmp_path / "all") / "GetWeather", "train.json")
    with pytest.raises(DataError, match=r"no examples \(left out: GetWeather\)"):
        read(tmp_path / "all")


def test_of_a_folder_as_snips_has_it_each_purpose_reads_its_own_and_nothing_twice(
    tmp_path: Path,
) -> None:
    path = folder(tmp_path / "GetWeather", "train_GetWeather.json", "train_GetWeather_full.json",
                  "validate_GetWeather.json")
    assert [each.input for each in load(path).examples] == ["train_GetWeather_full.json"]
    assert [each.input for each in read(path)] == ["validate_GetWeather.json"]
    assert str(select(path, LEARN)) == (
        "train_GetWeather_full.json (split train); left out: train_GetWeather.json (also in "
        "train_GetWeather_full.json), validate_GetWeather.json (validate)")
    assert [each.input for each in read(path, split=Split.TRAIN)] == ["train_GetWeather_full.json"]


def test_what_is_tested_on_comes_before_what_is_validated_on(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", "train-00000-of-00001.jsonl", "dev.jsonl", "x.test.jsonl")
    assert [each.input for each in read(path)] == ["x.test.jsonl"]
    assert [each.input for each in read(path, split=Split.VALIDATE)] == ["dev.jsonl"]
    assert [each.input for each in load(path).examples] == ["train-00000-of-00001.jsonl"]


@pytest.mark.parametrize(("names", "told"), [
    (("val.jsonl", "test.jsonl"),
     r"\(test: test\.jsonl; validate: val\.jsonl\); choose one with --split validate or --split "
     "test, or name a file"),
    (("mine.jsonl", "test.jsonl"), r"no split: mine\.jsonl; test: test\.jsonl"),
])
def test_where_no_purpose_decides_the_choice_is_asked_for(
    tmp_path: Path, names: tuple[str, ...], told: str
) -> None:
    path = folder(tmp_path / "data", *names)
    with pytest.raises(DataError, match=told):
        load(path)
    assert [each.input for each in load(path, split=Split.TEST).examples] == ["test.jsonl"]
    with pytest.raises(DataError, match=r"no split train \(.*\); name another, or a file"):
        load(path, split=Split.TRAIN)
    with pytest.raises(DataError, match=r"\(.*test\.jsonl.*\); name a file of one\.$"):
        select(path, LEARN, choice=False)


def test_lists_of_one_file_and_splits_of_another_are_never_mixed(tmp_path: Path) -> None:
    path = folder(tmp_path / "data")
    (path / "a.json").write_text(json.dumps({"train": [["learn", "x"]], "val": [["see", "x"]]}))
    (path / "b.json").write_text(json.dumps({"test": [["try", "x"]]}))
    assert [each.input for each in read(path)] == ["try"]
    assert select(path, MEASURE).left_out == {"a.json": "train, validate"}
    assert select(path, LEARN).left_out == {"a.json: val": "validate", "b.json": "test"}


def test_recordings_with_intents_become_orders_whose_files_stand_beside_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.flac").write_bytes(b"fLaC")
    (tmp_path / "labels.json").write_text(json.dumps({
        "clips/a.flac": {"intent": "orderDrink", "slots": {"size": "large", "drink": " mocha"}}}))
    (example,) = read(tmp_path)
    assert (example.task, example.input) == ("order", "")
    assert example.target == tool_call("orderDrink", [("size", "large"), ("drink", "mocha")])
    assert [message.content for message in example.messages] == [
        "order", (Audio(data=b"fLaC"),)]


def test_a_record_may_have_a_picture_before_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "notes.jsonl").write_text(json.dumps(
        {"task": "read", "image": "a.png", "input": "the first line", "target": "Milk"}))
    (example,) = read(tmp_path / "notes.jsonl")
    assert example.messages[-1].content == (Image(data=b"\x89PNG"), "the first line")
    assert example.to_dict()["image"] == str(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["none.png", "../outside.png", "/etc/hostname", ".", "a\0b"])
def test_a_file_that_is_not_there_or_outside_the_folder_is_refused_by_place(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(b"\x89PNG")
    (folder / "notes.jsonl").write_text(json.dumps(
        {"task": "read", "image": name, "target": "Milk"}))
    with pytest.raises(DataError, match=r"Record 1 of notes\.jsonl is without its file"):
        read(folder)
