"""Tool calls: read out of answers, and laid out as a model's chat template writes them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cloister.errors import ConstraintError, TokenizerError
from cloister.message import Message, ToolCall

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cloister.tokenizer import Tokenizer

__all__ = ["Function", "Layout", "functions", "layout", "tool_calls"]

# What models write around calls: Hermes and Qwen, Mistral, Llama 3.
_AROUND = re.compile(r"</?tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>")
_MOST_LEVELS = 100  # of a call's JSON
_ARGUMENTS = ("arguments", "parameters")
_PROBE = ToolCall(name="cloister_probe", arguments={"cloister_key": "cloister_value"})


def tool_calls(text: str) -> tuple[ToolCall, ...]:
    """Read the tool calls that `text` consists of; none where it is, or holds, anything else.

    A call is `{"name": ..., "arguments": {...}}`, alone, in a list, or between the marks that
    models write around calls. Who reads JSON may take any of two equal keys: they make none.
    """
    rest, found = _AROUND.sub(" ", text).strip(), list[ToolCall]()
    decoder = json.JSONDecoder(object_pairs_hook=_no_repeats)
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
            # A lone surrogate or NaN could not be kept, sent or laid out again.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            return ()
        if not _within(value, _MOST_LEVELS):
            return ()
        for record in value if isinstance(value, list) else [value]:
            call = _call(record)
            if call is None:
                return ()
            found.append(call)
        rest = rest[end:].lstrip(" \n\r\t;")
    return tuple(found)


def _call(record: object) -> ToolCall | None:
    if not isinstance(record, dict) or len(record) != 2:
        return None
    name = record.get("name")
    arguments = next((record[key] for key in _ARGUMENTS if key in record), None)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name=name, arguments=arguments)


def _within(value: object, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_within(part, levels - 1) for part in parts)


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError
    return record


@dataclass(frozen=True, kw_only=True)
class Function:
    """A tool as its schema describes it."""

    name: str
    parameters: Mapping[str, Any]  # JSON Schema of an object


def functions(tools: Sequence[Mapping[str, object]]) -> list[Function]:
    """Read tools, `{"name", "parameters"}` each, or `{"type": "function", "function": that}`.

    Raises:
        ConstraintError: one is malformed, two have the same name, or there is none.
    """
    found = list[Function]()
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        parameters = inner.get("parameters", {}) if isinstance(inner, dict) else None
        if (
            not isinstance(name, str) or not name or not isinstance(parameters, dict)
            or parameters.get("type", "object") != "object"
        ):
            raise ConstraintError(
                'A tool is {"name": ..., "parameters": {a JSON Schema of an object}}; correct tool '
                f"{len(found) + 1}."
            )
        found.append(Function(name=name, parameters=parameters))
    if not found:
        raise ConstraintError("The list of tools is empty; leave it out, or name some.")
    if len({function.name for function in found}) < len(found):
        raise ConstraintError("Two tools have the same name; rename one.")
    return found


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a chat template writes a call: `before`, the JSON of it, `after`."""

    before: str = ""
    after: str = ""
    arguments: str = "arguments"  # the key of the arguments


def layout(tokenizer: Tokenizer, end: Collection[int] = ()) -> Layout:
    """Find out how the chat template lays out a tool call; a bare one where it does not say.

    An answer ends before the first of the `end` tokens, or else before any special token.
    By laying out a call that it can recognize: where the JSON of that stands, the template's own
    text is around it.
    """
    if not tokenizer.renders_tool_calls:
        return Layout()
    asked = [Message(role="user", content="x")]
    called = [*asked, Message(role="assistant", content="", tool_calls=(_PROBE,))]
    try:
        begun = tokenizer.render(asked)
        whole = tokenizer.render(called, add_generation_prompt=False)
    except TokenizerError:
        return Layout()
    if not whole.startswith(begun):
        return Layout()
    text = whole[len(begun):]
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            record, stop = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        for key in _ARGUMENTS:
            if record == {"name": _PROBE.name, key: _PROBE.arguments}:
                return Layout(
                    before=text[:start], after=_closing(tokenizer, text[stop:], end),
                    arguments=key)
    return Layout()


def _closing(tokenizer: Tokenizer, text: str, end: Collection[int]) -> str:
    """What `text`, which follows a call, has before the answer's end."""
    for place in range(len(text)):
        if tokenizer.split_special(text[place:])[0] in end:
            return text[:place].rstrip("\n")
    first = next(iter(tokenizer.split_special(text)), "")
    return first.rstrip("\n") if isinstance(first, str) else ""
