"""Chat templates: what they are given, and in whose words they fail. No torch.

They get what transformers 5 gives them (utils/chat_template_utils.py): its blocks, filters and
functions. An error never quotes a message: only what stands in the template itself.
"""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cloister.errors import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jinja2.parser import Parser

__all__ = ["Template", "map_texts"]


class Template:
    """A chat template, compiled.

    Raises:
        TokenizerError: it is not valid Jinja, or asks for a filter or test that there is not.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        environment.filters["tojson"] = _to_json
        self._source = source
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:  # its words are of the template
            raise TokenizerError(
                f"The chat template is not valid Jinja (line {error.lineno}: "
                f"{(error.message or '').rstrip('.')}); correct it."
            ) from None
        except (RecursionError, jinja2.TemplateError):
            raise TokenizerError("The chat template is not valid Jinja; correct it.") from None
        self.literals = "\0".join(_literals(tree))  # every text that it can write by itself
        self._reasons = set(_reasons(tree))

    def render(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None, special_tokens: Mapping[str, str],
    ) -> str:
        """Lay out a conversation.

        Raises:
            TokenizerError: the template refuses it, or fails.
        """
        try:
            return self._template.render({
                **special_tokens, "messages": messages, "tools": tools, "documents": None,
                "add_generation_prompt": add_generation_prompt,
            })
        except Exception as error:  # a template is a program, and may fail in any way
            reason = self._reason(error)
        # Not chained: the cause may quote a message.
        raise TokenizerError(f"The chat template {reason}.")

    def reads(self, special_tokens: Mapping[str, str]) -> tuple[bool, bool]:
        """Whether it lays out contents that are texts, and those that are lists of parts."""
        text, other = "Probed question", "Probed key"

        def written(content: object) -> str:
            try:
                return self.render(
                    [{"role": "user", "content": content}], add_generation_prompt=False,
                    tools=None, special_tokens=special_tokens)
            except TokenizerError:
                return ""

        parts = written([{"type": "text", "text": text, "other": other}])
        # One that takes texts writes a list as Python would, with all that is in it.
        return text in written(text), text in parts and other not in parts

    def _reason(self, error: Exception) -> str:
        """Say why it failed, in its own words where these quote nobody else's."""
        if isinstance(error, _Refused):
            if isinstance(error.args[0], str) and error.args[0] in self._reasons:
                said = " ".join(str(error.args[0]).split()).rstrip(".")
                return f"refuses this conversation ({said}); change it accordingly"
            return (
                "refuses this conversation, in words that quote it; try messages of user and "
                "assistant by turns"
            )
        if isinstance(error, jinja2.exceptions.SecurityError):
            return "reaches for what no template may use; correct it"
        # "'x' is undefined", "'dict object' has no attribute 'x'", "No filter named 'x' found."
        found = re.search(r"(?:attribute|named) '(\w+)'|^'(\w+)' is undefined", str(error))
        name = found and (found[1] or found[2])
        if name and re.search(rf"\b{name}\b", self._source):
            if isinstance(error, jinja2.UndefinedError):
                return f"needs {name}, which it is not given; correct it"
            if isinstance(error, jinja2.TemplateRuntimeError):
                return f"uses {name}, which Jinja does not have; correct it"
        return f"fails ({type(error).__name__}); correct it"


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Map every text in a JSON value, names of fields included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_texts(key, change): map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_texts(item, change) for item in value]
    return value


class _Refused(Exception):
    """What `raise_exception` raises."""


class _Generation(Extension):
    """`{% generation %}`, by which templates mark answers for training: its body, unchanged."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _literals(tree: nodes.Template) -> Iterator[str]:
    yield from (node.data for node in tree.find_all(nodes.TemplateData))
    yield from (
        node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
    )


def _reasons(tree: nodes.Template) -> Iterator[object]:
    """Yield the reasons for a refusal that the template spells out."""
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == "raise_exception" and call.args:
            try:
                yield call.args[0].as_const()
            except nodes.Impossible:
                continue


def _raise(reason: object) -> NoReturn:
    raise _Refused(reason)


def _now(form: str) -> str:
    """Format the local time (`strftime_now`)."""
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
