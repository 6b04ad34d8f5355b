"""A finished answer is what its constraint asks for, whatever the model would have said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
from tests.conftest import SHAPE, make_bundle
from tests.unit.runtime.conftest import FakeEngine
from tokenizers import models, pre_tokenizers

from cloister.bundle import Bundle
from cloister.errors import AnswerIncomplete, ConstraintError
from cloister.message import Message, ToolCall
from cloister.runtime.chat import Ask, Sampling
from cloister.runtime.session import Session
from cloister.tokenizer import Tokenizer

SEEDS = 25
Schema = Mapping[str, object]


@pytest.fixture(scope="module")
def engine(long_bundle: Bundle) -> FakeEngine:
    """Its logits are random: whatever is right in an answer, the constraint has made so."""
    return FakeEngine(long_bundle.path)


def ask(engine: FakeEngine, seed: int = 0, prompt: str = "go", **options: Any) -> Message:
    sampling = Sampling(temperature=1.0, seed=seed)
    return Session(engine).ask(f"{prompt} {seed}", sampling=sampling, **options)


def finished(engine: FakeEngine, **options: Any) -> list[Message]:
    """Answers with many seeds, but for those that the context cut off."""
    found = []
    for seed in range(SEEDS):
        try:
            found.append(ask(engine, seed, **options))
        except AnswerIncomplete:
            continue
    assert len(found) > SEEDS / 4
    return found


WORD = {"type": "string", "maxLength": 4}
TREE: Schema = {
    "$ref": "#/$defs/tree", "$defs": {"tree": {
        "type": "object", "additionalProperties": False, "required": ["value"],
        "properties": {
            "value": {"type": "integer", "minimum": 0, "maximum": 9},
            "left": {"$ref": "#/$defs/tree"}, "right": {"$ref": "#/$defs/tree"}}}}}
SCHEMAS: dict[str, Schema] = {
    "nested": {
        "type": "object", "additionalProperties": False, "required": ["who", "where"],
        "properties": {
            "who": {"type": "object", "additionalProperties": False, "required": ["name"],
                    "properties": {"name": WORD, "age": {"type": "integer", "maximum": 200}}},
            "where": WORD}},
    "optional": {
        "type": "object", "additionalProperties": False,
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": WORD}},
    "enum": {"enum": ["red", 3, None, {"a": [1]}, "gr\u00fcn \u4f60"]},
    "const": {"const": {"a": "b", "c": [1, 2.5, True]}},
    "array": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 12},
              "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, WORD], "items": False,
              "minItems": 2},
    "pattern": {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$", "maxLength": 8},
    "date": {"type": "string", "format": "date"},
    "number": {"type": "number", "minimum": 0.5, "maximum": 1.5},
    "any of": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 7}, {"type": "null"}]},
    "tree": TREE,
    "optional self": {"type": "object", "additionalProperties": False,
                      "properties": {"next": {"$ref": "#"}}},
    "list of itself": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "self or null": {"type": ["object", "null"], "additionalProperties": False,
                     "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_finished_answer_meets_its_schema(engine: FakeEngine, name: str) -> None:
    schema = SCHEMAS[name]
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    texts = {message.content for message in finished(engine, schema=schema)}
    for text in texts:
        validator.validate(json.loads(text))
    assert len(texts) > 1 or name == "const"


def test_greedy_answers_meet_their_schema_too_and_end_without_a_token_for_it(
    engine: FakeEngine
) -> None:
    session = Session(engine)
    tokens = list(session.stream("go", schema={"enum": ["red", "blue"]}))
    assert "".join(token.text for token in tokens) in ('"red"', '"blue"')
    assert session.stats.finish == "end"
    assert session.stats.tokens == len(tokens)


def test_keys_come_in_the_schemas_order_and_spaces_as_json_dumps_writes_them(
    engine: FakeEngine
) -> None:
    schema = {"type": "object", "properties": {
        "b": {"type": "boolean"}, "a": {"type": "array", "items": {"type": "null"}, "minItems": 2,
                                        "maxItems": 2}},
        "required": ["a", "b"], "additionalProperties": False}
    texts = {message.content for message in finished(engine, schema=schema)}
    assert texts == {'{"b": true, "a": [null, null]}', '{"b": false, "a": [null, null]}'}


def test_choices_are_all_that_is_said(engine: FakeEngine) -> None:
    choices = [
        "yes", "no", "na\u00efve \u4f60\u597d", 'a "quoted"\n\\line', "<|end|>", "yes and no"]
    said = {message.content for message in finished(engine, choices=choices)}
    assert said <= set(choices)
    assert len(said) > 2


def test_a_grammar_is_followed(engine: FakeEngine) -> None:
    grammar = 'start: "<" word ("," word){0,3} ">"\nword: /[a-z]{1,3}/'
    texts = [message.content for message in finished(engine, grammar=grammar)]
    for text in texts:
        assert re.fullmatch(r"<[a-z]{1,3}(,[a-z]{1,3}){0,3}>", text)
    assert len(set(texts)) > 3


def weather() -> dict[str, object]:
    return {"name": "weather", "description": "What the weather is", "parameters": {
        "type": "object", "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["c", "f"]}},
        "required": ["city", "days"]}}


CLOCK = {"type": "function", "function": {"name": "what time?", "parameters": {}}}
NOTE = {"name": "note", "parameters": {  # not of the simple kind: in the schema's order
    "type": "object", "properties": {"to": {"$ref": "#/$defs/who"}, "text": {"enum": ["hi", "yo"]}},
    "required": ["to"], "$defs": {"who": {"enum": ["me", "you"]}}}}


def test_a_tool_call_is_one_of_the_tools_with_its_arguments_in_any_order(
    engine: FakeEngine
) -> None:
    tools = [weather(), CLOCK, NOTE]
    parameters = {"weather": weather()["parameters"], "note": NOTE["parameters"]}
    orders, names = set(), set()
    for message in finished(engine, tools=tools):
        (call,) = message.tool_calls
        assert json.loads(message.content) == {"name": call.name, "arguments": call.arguments}
        names.add(call.name)
        if call.name == "what time?":
            continue
        jsonschema.validate(call.arguments, parameters[call.name])
        if call.name == "weather":
            orders.add(tuple(call.arguments))
    assert names == {"weather", "what time?", "note"}
    for number in range(2):
        orders |= {
            tuple(message.tool_calls[0].arguments)
            for message in finished(engine, tools=[weather()], prompt=f"more {number}")}
    assert {("city", "days"), ("days", "city")} < orders
    assert {order[0] for order in orders} == {"city", "days", "unit"}
    assert all({"city", "days"} <= set(order) for order in orders)


def test_many_arguments_may_stand_in_any_order_or_in_the_schemas(engine: FakeEngine) -> None:
    for count in (40, 70):
        properties = {f"k{number}": {"enum": [1]} for number in range(count)}
        tool = {"name": "f", "parameters": {
            "type": "object", "properties": properties, "required": ["k1", "k3"]}}
        message = ask(engine, 1, tools=[tool])
        (call,) = message.tool_calls
        assert {"k1", "k3"} <= set(call.arguments) <= set(properties)


def test_an_argument_that_may_hold_the_whole_again_is_followed(engine: FakeEngine) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "additionalProperties": False,
            "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#/properties/c"}, "c": WORD}}}
    deepest = 0
    for message in finished(engine, tools=[tool]):
        (call,) = message.tool_calls
        jsonschema.validate(call.arguments, tool["parameters"])  # type: ignore[arg-type]
        deepest = max(deepest, message.content.count('"a"'))
    assert deepest > 1


def test_the_same_constraint_serves_many_answers_and_another_is_another(
    engine: FakeEngine
) -> None:
    for _ in range(2):
        for word in "abcdefghijkl":  # more than are kept
            assert ask(engine, choices=[word]).content == word
            assert ask(engine, schema={"const": word}).content == f'"{word}"'


def test_an_answer_that_is_left_leaves_the_next_one_its_own_beginning(engine: FakeEngine) -> None:
    for _ in range(3):
        session = Session(engine)
        stream: Any = session.stream("go", schema=SCHEMAS["nested"])
        assert next(stream).text.startswith("{")
        stream.close()


def test_what_has_to_come_is_spelled_and_a_guess_is_cut_where_it_breaks_the_rules(
    engine: FakeEngine
) -> None:
    encode, word = engine.tokenizer.encode, '{"name": "'
    schema = {"type": "object", "additionalProperties": False, "required": ["name"],
              "properties": {"name": {"enum": ["red", "green"]}}}
    constraint = engine.constraint(Ask.of("go", schema=schema))
    assert constraint is not None
    assert list(constraint.forced()) == encode(word)
    assert constraint.permitted([*encode(word), *encode("green"), *encode("?")]) == len(
        encode(word)) + len(encode("green"))
    for id_ in encode(word):
        constraint.accept(id_)
    assert list(constraint.forced()) == []  # there is a choice
    for id_ in encode("g"):
        constraint.accept(id_)
    assert list(constraint.forced()) == encode('reen"}')


# What cannot be followed.

SECRET = "a most private word"
PARAMETERS = "parameters"


def function(**parameters: object) -> list[dict[str, object]]:
    return [{"name": "f", PARAMETERS: parameters}]


BAD: dict[str, tuple[dict[str, object], str]] = {
    "schema of no JSON": ({"schema": {"enum": {SECRET}}}, "JSON"),
    "schema that is a list": ({"schema": [SECRET]}, "schema"),
    "schema with an unknown type": ({"schema": {"type": SECRET}}, "schema is malformed"),
    "schema with a broken pattern": (
        {"schema": {"type": "string", "pattern": f"({SECRET}"}}, "schema is malformed"),
    "schema with a reference to nothing": (
        {"schema": {"$ref": f"#/$defs/{SECRET}"}}, "schema is malformed"),
    "schema with a reference elsewhere": (
        {"schema": {"$ref": f"http://{SECRET}"}}, "schema is malformed"),
    "schema with a reference of no text": ({"schema": {"$ref": 5}}, "schema is malformed"),
    "unknown keyword": ({"schema": {"not": {"const": SECRET}}}, "keyword that is not supported"),
    "another unknown keyword": (
        {"schema": {"type": "array", "uniqueItems": True}}, "keyword that is not supported"),
    "empty enum": ({"schema": {"enum": []}}, "cannot be met"),
    "empty range": (
        {"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "cannot be met"),
    "two types at once": (
        {"schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "cannot be met"),
    "schema nested too deeply": (
        {"schema": json.loads('{"items": ' * 300 + "{}" + "}" * 300)}, "schema"),
    "grammar of no text": ({"grammar": 5}, "no text"),
    "empty grammar": ({"grammar": ""}, "grammar is malformed"),
    "grammar without a start": ({"grammar": f'x: "{SECRET}"'}, "grammar is malformed"),
    "grammar with an unknown rule": ({"grammar": "start: foo"}, "grammar is malformed"),
    "grammar with a broken pattern": ({"grammar": f"start: /[{SECRET}/"}, "grammar is malformed"),
    "grammar of itself": ({"grammar": "start: start"}, "grammar"),
    "grammar in a circle": ({"grammar": "start: a\na: b\nb: a"}, "grammar"),
    "grammar of nothing": ({"grammar": "start: /a/ & ~/a/"}, "grammar"),
    "no choices": ({"choices": []}, "choices is empty"),
    "an empty choice": ({"choices": [SECRET, ""]}, "choices is empty"),
    "a choice of no text": ({"choices": [SECRET, 5]}, "choices is empty"),
    "choices in one text": ({"choices": SECRET}, "choices is empty"),
    "a choice of no Unicode": ({"choices": ["\ud800"]}, "JSON has not"),
    "no tools": ({"tools": []}, "tools is empty"),
    "a tool that is none": ({"tools": [SECRET]}, "correct tool 1"),
    "a tool without a name": ({"tools": [weather(), {"name": ""}]}, "correct tool 2"),
    "a tool without parameters": ({"tools": [{"name": "f", PARAMETERS: None}]}, "correct tool 1"),
    "parameters that are no object": ({"tools": function(type="array")}, "correct tool 1"),
    "two tools of a name": ({"tools": [weather(), weather()]}, "same name"),
    "a tool with malformed properties": ({"tools": function(properties=SECRET)}, "malformed"),
    "a tool with a malformed schema": (
        {"tools": function(properties={"a": {"type": SECRET}})}, "malformed"),
    "a tool with malformed required keys": (
        {"tools": function(properties={"a": WORD}, required=5)}, "malformed"),
    "a tool with a required key of no text": (
        {"tools": function(properties={"a": WORD}, required=[5])}, "malformed"),
    "a tool that requires what it has not": (
        {"tools": function(properties={"a": WORD}, required=["b"])}, "cannot be met"),
    "a tool whose arguments ask for themselves": (
        {"tools": function(properties={"a": {"$ref": "#"}}, required=["a"], type="object")},
        "without end"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_followed_is_refused_by_name_before_anything_is_read(
    engine: FakeEngine, name: str
) -> None:
    options, match = BAD[name]
    session = Session(engine)
    engine.truncate(0)
    engine.program.calls.clear()
    with pytest.raises(ConstraintError, match=match) as caught:
        session.ask("go", **options)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)
    assert session.messages == []
    assert engine.program.calls == []
    assert ask(engine, choices=["ok"]).content == "ok"  # and the engine is free


ENDLESS: dict[str, Schema] = {
    "itself": {"$ref": "#"},
    "a required self": {
        "type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "references in a circle": {
        "$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "objects in a circle": {"$ref": "#/$defs/a", "$defs": {
        "a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
        "b": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}},
    "an item of its own": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "a first item of its own": {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
    "either of two endless ones": {"anyOf": [
        {"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
    "all of": {"allOf": [{"type": "object"}, {"$ref": "#"}]},
    "a further property": {
        "type": "object", "additionalProperties": {"$ref": "#"}, "required": ["z"]},
    "some property": {
        "type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_schema_that_asks_for_itself_without_end_is_refused(
    engine: FakeEngine, name: str
) -> None:
    with pytest.raises(ConstraintError, match="without end"):
        ask(engine, schema=ENDLESS[name])


@pytest.mark.parametrize("schema", [
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": []},
    {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 1},
    {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}},
])
def test_a_recursion_with_an_end_is_accepted(engine: FakeEngine, schema: Schema) -> None:
    stream: Any = Session(engine).stream("go", schema=schema)
    assert next(stream).text
    stream.close()


@pytest.mark.parametrize(("options", "limit"), [
    ({"tools": [weather()]}, 9), ({"schema": {"type": "string", "minLength": 900}}, 9),
    ({"grammar": 'start: "a" start'}, 9), ({"grammar": 'start: "a"{900}'}, None)])
def test_an_answer_cut_off_is_said_to_be_and_kept_as_far_as_it_came(
    engine: FakeEngine, options: dict[str, Any], limit: int | None
) -> None:
    session, seen = Session(engine), list[str]()
    with pytest.raises(AnswerIncomplete, match="allow more tokens"):
        for token in session.stream("go", max_tokens=limit, **options):
            seen.append(token.text)
    assert len(seen) == (limit or engine.context - session.stats.prompt_tokens)
    assert session.stats.finish == ("length" if limit else "context")
    assert session.messages == [
        Message(role="user", content="go"), Message(role="assistant", content="".join(seen))]
    with pytest.raises(AnswerIncomplete):
        Session(engine).ask("go", max_tokens=1, choices=["more than one token"])


def other_engine(tmp_path: Path, tokenizer_dir: Path, backend: tokenizers.Tokenizer) -> FakeEngine:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return FakeEngine(make_bundle(tmp_path / "other.cloister", directory).path)


def test_a_tokenizer_that_constraints_cannot_be_made_for_is_named(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    engine = other_engine(tmp_path, tokenizer_dir, backend)
    for _ in range(2):
        with pytest.raises(ConstraintError, match=r"tokenizer of bundle other\.cloister"):
            Session(engine).ask("a", choices=["a"])
    assert Session(engine).ask("a", max_tokens=3)  # unconstrained it answers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_that_the_tokenizer_cannot_spell_is_refused_by_name(
    tmp_path: Path, tokenizer_dir: Path, temperature: float
) -> None:
    words = {"<end>": 0, "a": 1, "b": 2, " ": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    engine = other_engine(tmp_path, tokenizer_dir, backend)
    for choices in (["c"], ["abc"]):
        with pytest.raises(ConstraintError) as caught:
            Session(engine).ask("a", choices=choices, sampling=Sampling(
                temperature=temperature, seed=1), max_tokens=8)
        assert not isinstance(caught.value, AnswerIncomplete)


def test_a_bundle_without_an_end_token_has_no_constraints(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bundle = make_bundle(
        tmp_path / "endless.cloister", tokenizer_dir, eos=(), context=512,
        shape=replace(SHAPE, context=512))
    with pytest.raises(ConstraintError, match=r"endless\.cloister names no token that ends"):
        Session(FakeEngine(bundle.path)).ask("go", choices=["a"])


def test_a_call_is_laid_out_and_kept_as_the_template_writes_it(
    fresh: Callable[..., FakeEngine]
) -> None:
    """Without calls in the template, as here, it is the bare JSON; see also `test_tools`."""
    engine = fresh()
    session = Session(engine)
    call = session.ask("go", tools=[CLOCK])
    assert call.tool_calls == (ToolCall(name="what time?", arguments={}),)
    result = Message(role="tool", content='"noon"', name="what time?")
    session.ask([result], max_tokens=3)
    assert session.messages[1:3] == [call, result]


def test_an_answer_that_met_its_constraint_at_the_limit_is_whole(fresh: Any) -> None:
    session = Session(fresh(prefer=()))
    tokens = list(session.stream(
        "the fox", grammar="start: /[a-z ]+/", max_tokens=3,
        sampling=Sampling(temperature=1.0, seed=1)))
    assert tokens
    assert session.stats.finish in ("length", "end")


def test_an_answer_that_did_not_meet_its_constraint_is_not_given_again(
    fresh: Any, vault: Any
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 40}},
              "required": ["a"], "additionalProperties": False}
    for _ in range(2):
        session = Session(fresh(prefer=()), vault=vault, cached=True)
        with pytest.raises(AnswerIncomplete):
            session.ask("the fox", schema=schema, max_tokens=3)


def test_special_tokens_in_a_tools_description_are_text(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(
        tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")),
        "{% for t in tools or [] %}{{ t.name }}: {{ t.description }}{% endfor %}"
        "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}")
    tools = [{"name": "fox", "description": "a <|end|> dog", "parameters": {}}]
    ids = tokenizer.encode_chat([Message(role="user", content="x")], tools=tools)
    assert ids.count(tokenizer.id_of("<|end|>")) == 1
    assert tokenizer.decode(ids).startswith("fox: a <|end|> dog")
