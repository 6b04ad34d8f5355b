"""Answers that follow a JSON schema, a grammar, a choice or a tool's parameters, by llguidance.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llguidance
import msgspec
import torch

from cloister.errors import ConstraintError
from cloister.runtime.tools import functions, layout

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from cloister.runtime.chat import Ask
    from cloister.runtime.tools import Function, Layout
    from cloister.tokenizer import Tokenizer

__all__ = ["Grammars"]

_KEPT = 8  # constraints that are made already
_MOST_SPELLED = 1024  # texts that rules force
_MOST_KEYS = 64  # of arguments in any order: bits of a rule's parameter
# Otherwise what must come is spelled as llguidance would spell it; models have ways of their own.
_OPTIONS = '%llguidance {"no_forcing": true}'
# JSON as Python's json.dumps writes it, and as models are taught it.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes the constraints of one tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, *, vocabulary: int, end: Sequence[int], name: str
    ) -> None:
        """Read `tokenizer` for a model of `vocabulary` rows, whose answers `end` tokens end.

        Raises:
            ConstraintError: llguidance cannot read the tokenizer, or no token ends an answer.
        """
        self._tokenizer, self._end = tokenizer, list(end)
        self._spelled = lru_cache(_MOST_SPELLED)(self._spell)
        self._made: dict[bytes, _Matcher] = {}
        if not end:
            raise ConstraintError(
                f"Bundle {name} names no token that ends an answer; a constraint needs one."
            )
        try:
            self._words = llguidance.LLTokenizer(
                tokenizer.definition, n_vocab=vocabulary, eos_token=self._end)
        except Exception:  # whatever its reader of tokenizers stumbles over
            raise ConstraintError(
                f"The tokenizer of bundle {name} is of a kind that constraints cannot be made for; "
                "ask without one."
            ) from None

    def of(self, ask: Ask) -> _Matcher:
        """Build the constraint of `ask`, which has one.

        Raises:
            ConstraintError: it is malformed, endless, cannot be met, or uses what llguidance lacks.
        """
        try:
            key = msgspec.json.encode(ask.constraints)
        except (TypeError, ValueError, RecursionError):
            raise ConstraintError(
                "A constraint holds a value that JSON has not; correct it.") from None
        try:
            matcher = self._made.pop(key, None) or self._make(ask)
        except (TypeError, ValueError, RecursionError):
            raise ConstraintError(
                "A schema or tool holds a value that JSON has not, or is nested too deeply; "
                "correct it."
            ) from None
        self._made[key] = matcher  # the latest last
        if len(self._made) > _KEPT:
            del self._made[next(iter(self._made))]
        return matcher.copy()

    def _spell(self, text: bytes) -> Sequence[int]:
        """Return the tokens of a text of the rules, none where it ends within a character."""
        try:
            return self._tokenizer.encode(text.decode())
        except UnicodeDecodeError:
            return ()

    def _make(self, ask: Ask) -> _Matcher:
        if ask.schema is not None:
            what, rules = "schema", _schema(ask.schema)
        elif ask.grammar is not None:
            if not isinstance(ask.grammar, str):
                raise ConstraintError("The grammar is no text; give it in Lark.")
            what, rules = "grammar", ask.grammar
        elif ask.choices is not None:
            what, rules = "list of choices", _choices(ask.choices)
        else:
            what, rules = "list of tools", self._tools(functions(ask.tools or ()))
        if "%llguidance" not in rules:
            rules = f"{_OPTIONS}\n{rules}"
        grammar = llguidance.LLMatcher.grammar_from_lark(rules)
        matcher = _Matcher(
            llguidance.LLMatcher(self._words, grammar, log_level=0), what, self._spelled)
        if not matcher.allowed().any():  # refused before anything is read
            raise ConstraintError(f"The {what} cannot be met by any answer; correct it.")
        return matcher

    def _tools(self, tools: Sequence[Function]) -> str:
        rules = ["start: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
        form = layout(self._tokenizer, self._end)
        for number, tool in enumerate(tools):
            _check_ends(tool.parameters, "list of tools")
            rules += self._call(number, tool, form)
        return "\n".join(rules)

    def _call(self, number: int, tool: Function, form: Layout) -> Iterator[str]:
        """Rules of one tool's call; its arguments may stand in any order, each once."""
        before, after = self._literal(form.before), self._literal(form.after)
        head = _quoted(
            '{"name": ' + json.dumps(tool.name, ensure_ascii=False) + f', "{form.arguments}": ')
        properties = _dict(tool.parameters.get("properties"))
        keys = tool.parameters.get("required", [])
        simple = (
            set(tool.parameters) <= {
                "type", "properties", "required", "additionalProperties", "title", "description",
                "$schema"}
            and tool.parameters.get("additionalProperties", False) is False
            and isinstance(keys, list) and all(key in list(properties) for key in keys)
            and not any(_references(tool.parameters))  # which count from the whole
        )
        if not properties or not simple or len(properties) > _MOST_KEYS:
            # In the schema's order, as llguidance has it.
            value = _json({"type": "object", "additionalProperties": False, **tool.parameters})
            yield f'call_{number}: {before} {head} {value} "}}" {after}'
            return
        required = [list(properties).index(key) for key in keys]
        done = "true"
        for bit in required:
            done = f"and({done}, bit_set({bit}))"
        yield f'call_{number}: {before} {head} "{{" first_{number}::0x0 "}}}}" {after}'
        first, rest = [f'"" %if {done}'], [f'"" %if {done}']
        for bit, (key, schema) in enumerate(properties.items()):
            name = f"pair_{number}_{bit}"
            yield f"{name}: {_quoted(json.dumps(key, ensure_ascii=False) + ': ')} {_json(schema)}"
            first.append(f"{name} rest_{number}::set_bit({bit})")
            rest.append(f'", " {name} rest_{number}::set_bit({bit}) %if bit_clear({bit})')
        yield f"first_{number}::_: " + " | ".join(first)
        yield f"rest_{number}::_: " + " | ".join(rest)

    def _literal(self, text: str) -> str:
        return " ".join(
            f"<[{piece}]>" if isinstance(piece, int) else _quoted(piece)
            for piece in self._tokenizer.split_special(text))


class _Matcher:
    """A constraint in the making of one answer (see `cloister.runtime.generate.Constraint`)."""

    def __init__(
        self, matcher: Any, what: str, spelled: Callable[[bytes], Sequence[int]]
    ) -> None:  # untyped inside
        self._matcher, self._what, self._spelled = matcher, what, spelled

    def copy(self) -> _Matcher:
        """Begin another answer of the same constraint: much sooner than making it again."""
        return _Matcher(self._matcher.deep_copy(), self._what, self._spelled)

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> torch.Tensor:
        """Mask of the next token, bool[V]."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.bool)
        self._check()
        return mask

    def permits(self, id_: int) -> bool:
        """Whether the token `id_` may come next."""
        return self.permitted([id_]) == 1

    def permitted(self, ids: Sequence[int]) -> int:
        """Count those of `ids`, from the front, that may come one after the other."""
        return int(self._matcher.validate_tokens(list(ids)))

    def forced(self) -> Sequence[int]:
        """Return the tokenizer's spelling of the text that has to come."""
        text = self._matcher.compute_ff_bytes()
        return self._spelled(text) if text else ()

    def accept(self, id_: int) -> None:
        """Go on after the token `id_`."""
        if not self._matcher.consume_token(id_):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(_reason(self._what, self._matcher.get_error()))


def _reason(what: str, error: str) -> str:
    """Say why without quoting: a schema or grammar may hold what a user typed."""
    if "nsatisfiable" in error:
        return f"The {what} cannot be met by any answer; correct it."
    if "Unimplemented keys" in error or "nimplemented" in error:
        return f"The {what} uses a keyword that is not supported; see llguidance's documentation."
    if "too complex" in error.lower() or "limit" in error.lower():
        return f"The {what} is too complex to follow; simplify it."
    return f"The {what} is malformed; correct it."


def _schema(schema: Mapping[str, object]) -> str:
    _check_ends(schema, "schema")
    try:
        return f"start: {_json(schema)}"
    except (TypeError, ValueError, RecursionError):
        raise ConstraintError("The schema is no JSON object; correct it.") from None


def _choices(choices: Sequence[str]) -> str:
    if isinstance(choices, str) or not choices or not all(
        isinstance(choice, str) and choice for choice in choices
    ):
        raise ConstraintError("The list of choices is empty, or one of them is; name some texts.")
    return "start: " + " | ".join(map(_quoted, choices))


def _quoted(text: str) -> str:
    """A text as a Lark literal."""
    return json.dumps(text)


def _json(schema: object) -> str:
    return "%json " + json.dumps({**_record(schema), "x-guidance": _SPACING})


def _record(schema: object) -> Mapping[str, object]:
    if isinstance(schema, dict):
        return schema
    return {} if schema is True else {"enum": []}


def _check_ends(schema: Mapping[str, Any], what: str) -> None:
    """Raise unless some value of finite size meets `schema`.

    Raises:
        ConstraintError: it asks for itself without end.
    """
    try:
        references = set(_references(schema))
        finite = set[str]()
        while new := {
            each for each in references - finite if _ends(_target(schema, each), finite)
        }:
            finite |= new
        ends = _ends(schema, finite)
    except RecursionError:
        raise ConstraintError(f"The {what} is nested too deeply; simplify it.") from None
    if not ends:
        raise ConstraintError(f"The {what} asks for itself without end; give it a way to stop.")


def _references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _target(root: Mapping[str, Any], reference: str) -> object:
    target: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        target = target.get(step) if isinstance(target, dict) else None
    return target


def _ends(schema: object, finite: Collection[str]) -> bool:
    """Whether `schema` has a value of finite size, given the references that have one."""
    if not isinstance(schema, dict):
        return True
    reference, kinds = schema.get("$ref"), schema.get("type")
    branches = [_list(schema[key]) for key in ("anyOf", "oneOf") if schema.get(key)]
    return (
        (not isinstance(reference, str) or reference in finite)
        and all(_ends(part, finite) for part in _list(schema.get("allOf")))
        and all(any(_ends(part, finite) for part in branch) for branch in branches)
        # Without a type any value will do, such as null.
        and any(
            all(_ends(part, finite) for part in _needed(kind, schema, finite))
            for kind in (_list(kinds) or [kinds]))
    )


def _needed(kind: object, schema: Mapping[str, object], finite: Collection[str]) -> list[object]:
    """Schemas of which a value of that kind and `schema` cannot be without one each."""
    if kind == "array":
        items = [*_list(schema.get("prefixItems")), schema.get("items")]
        return items[:_number(schema.get("minItems"))]
    if kind != "object":
        return []
    properties, rest = _dict(schema.get("properties")), schema.get("additionalProperties")
    required = [key for key in _list(schema.get("required")) if isinstance(key, str)]
    needed = [properties.get(key, rest) for key in required]
    if _number(schema.get("minProperties")) > len(required):  # one more, the easiest
        more = [*properties.values(), *_dict(schema.get("patternProperties")).values(), rest]
        needed.append(next((part for part in more if _ends(part, finite)), more[0]))
    return needed


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
