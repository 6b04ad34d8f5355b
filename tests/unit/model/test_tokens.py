"""The ids of a prompt are those that the model's makers meant, which is what transformers gives.

A thousand conversations for each style:

    python -m pytest -m campaign tests/unit/model/test_tokens.py
"""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tests.unit.model.spoken import (
    CHATML,
    NO_SYSTEM,
    STYLES,
    byte_level,
    controls,
    conversation,
    gemma,
    sentence_pieces,
    special,
    unigram,
    write,
)

from cloister.corpus import Example
from cloister.errors import CheckpointError, TokenizerError, VocabularyMismatch
from cloister.message import Message
from cloister.model import tokens
from cloister.pairs import pair
from cloister.tokenizer import Tokenizer

ROWS = 1000


def ours(directory: Path) -> Tokenizer:
    read = tokens.read(directory, ROWS)
    return Tokenizer(
        tokenizers.Tokenizer.from_str(read.tokenizer), read.template,
        special_tokens=read.special_tokens, eos=read.eos)


def theirs(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("count", [
    40, pytest.param(1000, marks=[pytest.mark.campaign, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("style", STYLES)
def test_every_conversation_has_the_ids_that_transformers_gives_it(
    tmp_path: Path, style: str, count: int
) -> None:
    directory = write(tmp_path, style)
    mine, reference = ours(directory), theirs(directory)
    rng, never = random.Random(style), controls(style)
    differing, tools = [], [{"type": "function", "function": {"name": "f", "x": ["\u00e9", 1]}}]
    for number in range(count):
        said = conversation(rng, system=style not in NO_SYSTEM, never=never)
        answer = said[-1]["role"] != "assistant"
        wanted = reference.apply_chat_template(
            said, add_generation_prompt=answer, return_dict=False,
            tools=tools if number % 2 else None)
        got = mine.encode_chat(
            [Message(**turn) for turn in said], add_generation_prompt=answer,
            tools=tools if number % 2 else None)
        if got != wanted:
            differing.append((said, got, wanted))
    assert not differing, f"{len(differing)} of {count} differ (seed {style!r}): {differing[0]}"


BASES = {
    "byte level": partial(byte_level, []), "gemma": partial(gemma, []),
    "unigram": partial(unigram, []),
    **{f"metaspace {scheme}": partial(sentence_pieces, [], scheme)
       for scheme in ("first", "always", "never", None)},
}
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
CONTENTS = (
    "<a>", "<B>", "<|c|>", "word", "hello", "\u00de", "<d e>", "  ", "\n\n", "[X]", "\ufb01",
)


def flagged_directory(directory: Path, rng: random.Random, base: str) -> Path:
    """Added tokens of any flags in tokenizer.json, in tokenizer_config.json, or in both."""
    def flags() -> dict[str, bool]:
        return {flag: rng.random() < 0.4 for flag in FLAGS}

    backend, chosen = BASES[base](), rng.sample(CONTENTS, rng.randint(1, 6))
    inside = [token for token in chosen if rng.random() < 0.6]
    backend.add_tokens([tokenizers.AddedToken(token, **flags()) for token in inside])
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    declared = {}
    for token in sorted(chosen, key=inside.__contains__, reverse=True):
        if token not in inside or rng.random() < 0.5:
            backend.add_tokens([token])
            declared[backend.token_to_id(token)] = {"content": token, **flags()}
    literal = "".join(rng.choice([" ", "", "\n", "  ", "x"]) + rng.choice(chosen) for _ in range(3))
    record: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": declared,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ " + json.dumps(literal)
        + " }}{{ m.content }}{{ eos_token }}{{ other_token }}{% endfor %}"}
    for name in ("bos_token", "eos_token", "sep_token", "other_token"):
        if rng.random() < 0.4:
            record[name] = rng.choice([*chosen, "<new>"])
    (directory / "tokenizer_config.json").write_text(json.dumps(record))
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("count", [
    8, pytest.param(300, marks=[pytest.mark.campaign, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("base", BASES)
def test_added_tokens_of_every_flag_are_those_of_transformers(
    tmp_path: Path, base: str, count: int
) -> None:
    rng = random.Random(base)
    for number in range(count):
        directory = flagged_directory(tmp_path / str(number), rng, base)
        mine, reference = ours(directory), theirs(directory)
        for _ in range(4):
            said = conversation(rng, system=False, never=(*CONTENTS, "<new>", "fi"))
            turns = [Message(**turn) for turn in said]
            try:
                wanted = reference.apply_chat_template(said, return_dict=False)
            except BaseException as error:  # the library gives up, and so do we, in a sentence
                assert type(error).__name__ == "PanicException"  # noqa: PT017
                with pytest.raises(TokenizerError, match="too close"):
                    mine.encode_chat(turns, add_generation_prompt=False)
                continue
            got = mine.encode_chat(turns, add_generation_prompt=False)
            assert got == wanted, (number, said, (directory / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("count", [
    20, pytest.param(1000, marks=[pytest.mark.campaign, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("style", STYLES)
def test_no_control_token_that_a_user_types_counts(
    tmp_path: Path, style: str, count: int
) -> None:
    """The control tokens are those of the same conversation with other words in their place."""
    directory = write(tmp_path, style)
    mine, typed = ours(directory), tuple(controls(style))
    ids = {mine.id_of(token) for token in typed}
    rng = random.Random(style)
    for _ in range(count):
        said = conversation(
            rng, system=style not in NO_SYSTEM, words=(*typed, *typed, "the", "<", "|>"))
        for turn in said[1::2] if said[0]["role"] == "user" else said[2::2]:  # an answer's own
            turn["content"] = re.sub("</?think>|<tool_call>", "x", turn["content"])
        plain = [{**turn, "content": "x"} for turn in said]
        answer = said[-1]["role"] != "assistant"
        got, wanted = (
            [id_ for id_ in mine.encode_chat(
                [Message(**turn) for turn in turns], add_generation_prompt=answer) if id_ in ids]
            for turns in (said, plain))
        assert got == wanted, said


@pytest.mark.parametrize("style", STYLES)
def test_what_stands_around_a_typed_control_token_is_encoded_as_ever(
    tmp_path: Path, style: str
) -> None:
    mine, typed = ours(write(tmp_path, style)), controls(style)[-1]
    def asked(content: str) -> list[int]:
        return mine.encode_chat([Message(role="user", content=content)])

    got, without = asked(f"hello the quick\n{typed}"), asked("hello the quick\n.")
    same = next(place for place, pair in enumerate(zip(got, without, strict=False))
                if pair[0] != pair[1])
    assert "quick" in mine.decode(got[:same])
    if mine.id_of("<0x0A>") is None and style != "flags":  # these lose no byte
        assert typed in mine.decode(got)


def test_an_answer_may_hold_the_marks_that_the_model_wrote_in_it(tmp_path: Path) -> None:
    mine = ours(write(tmp_path, "deepseek"))
    think, call = mine.id_of("<think>"), mine.id_of("<tool_call>")

    def ids(role: str, content: str) -> list[int]:
        return mine.encode_chat(
            [Message(role="user", content="a"), Message(role=role, content=content)],
            add_generation_prompt=False)

    assert {think, call} <= set(ids("assistant", "<think>x<tool_call>"))
    assert think not in ids("user", "<think>x")
    assert not {mine.id_of("<\uff5cUser\uff5c>")} & set(
        ids("assistant", "<\uff5cUser\uff5c>x")[2:])


def config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def first_words(directory: Path) -> str:
    """What stands before a user's first text."""
    return ours(directory).render([Message(role="user", content="Q")]).partition("Q")[0]


def test_of_several_templates_the_default_is_taken_and_that_for_tools_with_tools(
    tmp_path: Path
) -> None:
    directory = write(tmp_path, "chatml", chat_template=[
        {"name": "tool_use", "template": "{% if true %}\n{{ tools | length }}: \n" + CHATML + "\n"
         "{% endif %}\n"},
        {"name": "default", "template": "\n  " + CHATML + "\n  \n"},
        {"name": "rag", "template": "{{ nothing.at.all }}"},
    ])
    mine, reference = ours(directory), theirs(directory)
    message = {"role": "user", "content": "hello there"}
    for tools in (None, [{"name": "f"}], []):
        wanted = reference.apply_chat_template(
            [message], tools=tools, add_generation_prompt=True, return_dict=False)
        assert mine.encode_chat([Message(**message)], tools=tools) == wanted


def test_templates_are_found_wherever_they_are_kept(tmp_path: Path) -> None:
    directory = write(tmp_path, "chatml", chat_template=...)
    assert first_words(directory) == "user: "
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "json " + CHATML}))
    assert first_words(directory) == "json <|im_start|>user\n"
    config(directory, chat_template="config " + CHATML)
    assert first_words(directory).startswith("config ")
    (directory / "chat_template.jinja").write_text("file " + CHATML)
    assert first_words(directory).startswith("file ")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool_use.jinja").write_text("tools " + CHATML)
    mine, reference = ours(directory), theirs(directory)
    for tools in (None, [{"name": "f"}]):
        assert mine.encode_chat([Message(role="user", content="a")], tools=tools) == (
            reference.apply_chat_template(
                [{"role": "user", "content": "a"}], tools=tools, add_generation_prompt=True,
                return_dict=False))


def test_templates_without_a_default_are_refused_with_their_names(tmp_path: Path) -> None:
    directory = write(
        tmp_path, "chatml", chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(CheckpointError, match=r"rag.*chat_template\.jinja"):
        tokens.read(directory, ROWS)


ADDED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
         "special": True}


def test_added_tokens_of_every_file_are_those_of_transformers(tmp_path: Path) -> None:
    base = byte_level(special("<s>", "</s>"))
    size = base.get_vocab_size()
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<a> <b>\n{{ sep_token }}"
    template += "{{ mask_token }}<c> {{ image_token }}{% endfor %}"
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken", **ADDED},
             "sep_token": "<sep>", "image_token": "<img>"}
    shapes: dict[str, dict[str, Any]] = {
        "decoder": {"tokenizer_config.json": {
            **names, "chat_template": template, "extra_special_tokens": ["<c>"],
            "added_tokens_decoder": {
                "1": {"content": "</s>", **ADDED, "rstrip": True},
                str(size): {"content": "<a>", **ADDED, "special": False, "rstrip": True},
                str(size + 1): {"content": "<b>", **ADDED, "lstrip": True}}}},
        "older files": {
            "tokenizer_config.json": {"chat_template": template, "sep_token": "<not this>",
                                      "additional_special_tokens": ["<c>"]},
            "special_tokens_map.json": {**names, "mask_token": {"content": "<mask>", **ADDED,
                                                                "lstrip": True}},
            "added_tokens.json": {"<a>": size, "<b>": size + 1}},
    }
    for shape, files in shapes.items():
        directory = tmp_path / shape
        directory.mkdir()
        base.save(str(directory / "tokenizer.json"))
        (directory / "config.json").write_text("{}")
        for name, record in files.items():
            (directory / name).write_text(json.dumps(record))
        mine, reference = ours(directory), theirs(directory)
        said = [{"role": "user", "content": "hello  there "}]
        wanted = reference.apply_chat_template(said, return_dict=False)
        assert mine.encode_chat(
            [Message(**said[0])], add_generation_prompt=False) == wanted, shape
        assert mine.id_of("<b>") == size + 1


def test_a_named_token_that_the_model_has_no_row_for_stays_text(tmp_path: Path) -> None:
    directory = write(tmp_path, "chatml", pad_token="[PAD]")
    rows = max(byte_level(special("<|im_start|>", "<|im_end|>")).get_vocab().values()) + 1
    read = tokens.read(directory, rows)
    assert read.special_tokens["pad_token"] == "[PAD]"
    assert tokenizers.Tokenizer.from_str(read.tokenizer).token_to_id("[PAD]") is None
    assert tokenizers.Tokenizer.from_str(
        tokens.read(directory, rows + 1).tokenizer).token_to_id("[PAD]") == rows


def test_begin_and_end_are_those_that_the_files_name(tmp_path: Path) -> None:
    directory = write(tmp_path, "llama-3")
    mine = ours(directory)
    ids = {name: mine.id_of(f"<|{name}|>") for name in ("end_of_text", "eot_id", "begin_of_text")}
    (directory / "generation_config.json").write_text(json.dumps(
        {"bos_token_id": ids["begin_of_text"], "eos_token_id": [ids["end_of_text"]]}))
    read = tokens.read(directory, ROWS)
    assert read.bos == ids["begin_of_text"]
    assert read.eos == (ids["end_of_text"], ids["eot_id"])
    assert read.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (directory / "tokenizer_config.json").unlink()  # then the ids say it, and there is no template
    read = tokens.read(directory, ROWS)
    assert read.special_tokens == {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    assert read.eos == (ids["end_of_text"],)


@pytest.mark.parametrize("style", ["llama-3", "llama-2-first", "gemma", "chatml"])
def test_without_a_template_a_text_begins_as_the_model_was_trained_to_begin(
    tmp_path: Path, style: str
) -> None:
    directory = write(tmp_path, style, chat_template=...)
    mine, reference = ours(directory), theirs(directory)
    assert mine.encode_chat([Message(role="user", content="hello")]) == (
        reference("user: hello\nassistant:").input_ids)


@pytest.mark.parametrize(("style", "task", "answer"), [
    ("llama-3", "be brief", "how are you<|eot_id|>"), ("chatml", "x", "how are you<|im_end|>"),
    ("gemma", None, "how are you<end_of_turn>"), ("mistral-first", None, "how are you</s>"),
    ("llama-2", "be brief", "how are you </s>"), ("zephyr", "x", "how are you</s>"),
    ("phi-3", "x", "how are you<|end|>"),
])
def test_what_is_taught_is_the_answer_as_the_template_lays_it_out(
    tmp_path: Path, style: str, task: str | None, answer: str
) -> None:
    directory = write(tmp_path, style)
    mine, reference = ours(directory), theirs(directory)
    prompt, taught = pair(
        mine, Example(task=task or "be brief", input="hello there", target="how are you"))
    asked = [{"role": "user", "content": "hello there"}]
    if task is None:
        asked = [{"role": "user", "content": "be brief: hello there"}]
    else:
        asked = [{"role": "system", "content": task}, *asked]
    whole = reference.apply_chat_template(
        [*asked, {"role": "assistant", "content": "how are you"}], return_dict=False)
    assert whole[:len(prompt) + len(taught)] == prompt + taught
    assert reference.decode(taught).strip() == answer
    assert taught[-1] == mine.turn_end
    assert taught[-1] in tokens.read(directory, ROWS).eos


def test_where_there_is_no_system_role_the_sentence_says_so(tmp_path: Path) -> None:
    mine = ours(write(tmp_path, "gemma"))
    with pytest.raises(TokenizerError, match=r"System role not supported.*no system role"):
        mine.encode_chat([Message(role="system", content="a"), Message(role="user", content="b")])
    with pytest.raises(TokenizerError, match=r"\(Conversation roles must alternate\)"):
        mine.encode_chat([Message(role="user", content="a"), Message(role="user", content="b")])


# What is refused.


@pytest.mark.parametrize(("template", "said"), [
    ("{{ documents[0].title }}" + CHATML, "fails|needs"),
    ("{{ user.name }}" + CHATML, "needs user"),
    ("{{ messages[0].media.url }}" + CHATML, "needs media"),
    ("{{ messages | groups }}" + CHATML, "No filter named 'groups'"),
    ("{% if messages is odder %}{% endif %}", "odder, which Jinja does not have"),
    ("{% for %}", "line 1"), ("{{ raise_exception('Use another model') }}", "Use another model"),
    ("{{ ''.__class__.__mro__ }}", "no template may use|needs __mro__"),
    ("{% for m in messages %}{% for part in m.content %}{{ part.type }}{% endfor %}{% endfor %}",
     "leaves out what a user says"), ("chatml", "leaves out what a user says"),
])
def test_a_template_that_needs_what_it_is_not_given_is_refused_by_name(
    tmp_path: Path, template: str, said: str
) -> None:
    with pytest.raises(TokenizerError, match=said):
        tokens.read(write(tmp_path, "chatml", chat_template=template), ROWS)


@pytest.mark.parametrize("template", [
    "{{ raise_exception('No ' + messages[0].content) }}", "{{ dict()[messages[0].content].x }}",
    "{{ raise_exception(messages[0].content) }}", "{{ messages[0][messages[0].content].x }}",
])
def test_a_refusal_never_quotes_a_message(template: str) -> None:
    mine = Tokenizer(byte_level([]), template)
    with pytest.raises(TokenizerError) as caught:
        mine.encode_chat([Message(role="user", content="zebra")])
    assert "zebra" not in str(caught.value)


@pytest.mark.parametrize(("change", "error", "said"), [
    ({"generation_config.json": {"eos_token_id": 2000}}, VocabularyMismatch, "2000.*1000 rows"),
    ({"generation_config.json": {"bos_token_id": 2000}}, VocabularyMismatch, "2000.*1000 rows"),
    ({"generation_config.json": {"eos_token_id": "</s>"}}, CheckpointError, "no token id"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"700": {"content": "<x>"}}}},
     CheckpointError, r"'<x>' the id 700.*it is \d+"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<x>"}}}},
     CheckpointError, "malformed"),
    ({"tokenizer_config.json": {"added_tokens_decoder": []}}, CheckpointError, "malformed"),
    ({"tokenizer_config.json": {"chat_template": 5}}, CheckpointError, "malformed"),
    ({"tokenizer_config.json": {"chat_template": [{"name": "default"}]}}, CheckpointError,
     "malformed"),
    ({"added_tokens.json": {"<x>": "y"}, "tokenizer_config.json": {}}, CheckpointError,
     "malformed"),
])
def test_files_that_cannot_be_right_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    directory = write(tmp_path, "chatml")
    for name, record in change.items():
        (directory / name).write_text(json.dumps(record))
    with pytest.raises(error, match=said):
        tokens.read(directory, ROWS)


def test_a_template_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, "chatml")
    (directory / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match="copy it again"):
        tokens.read(directory, ROWS)


def test_an_end_token_that_the_tokenizer_cannot_spell_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, "chatml", eos_token=...)
    (directory / "config.json").write_text('{"eos_token_id": 900}')
    with pytest.raises(CheckpointError, match=r"end token 900.*added_tokens"):
        tokens.read(directory, ROWS)


@pytest.mark.parametrize(("encoding", "good"), [("utf-8-sig", True), ("utf-16", False)])
def test_a_tokenizer_in_another_encoding_is_read_or_refused(
    tmp_path: Path, encoding: str, good: bool
) -> None:
    directory = write(tmp_path, "chatml")
    path = directory / "tokenizer.json"
    text = path.read_text("utf-8")
    path.write_text(text, encoding)
    if good:
        assert tokens.read(directory, ROWS).tokenizer == text
    else:
        with pytest.raises(CheckpointError, match="copy it again"):
            tokens.read(directory, ROWS)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_a_tokenizer_of_another_kind_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, name: str
) -> None:
    directory = write(tmp_path / "llama", "chatml")
    (directory / "tokenizer.json").rename(directory / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*from_pretrained\('llama'\)"):
        tokens.read(directory, ROWS)


def test_a_template_with_a_clock_lays_out_the_time_of_now(tmp_path: Path) -> None:
    import datetime

    directory = write(tmp_path, "chatml", chat_template="{{ strftime_now('%Y') }} " + CHATML)
    year = str(datetime.datetime.now().year)
    assert first_words(directory).startswith(year)
