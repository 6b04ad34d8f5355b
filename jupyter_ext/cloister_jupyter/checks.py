"""How an answer is judged: by a check of its case, or by the answer that is wanted.

| kind | passes where the answer |
|---|---|
| `exact` | is the text, but for outer spaces |
| `contains` | has the text in it, or every text of a list |
| `json` | is JSON with these fields; `a.b.0` is a place in it |
| `schema` | is JSON that a JSON Schema allows |
| `regex` | has a match of a regular expression (Python's) |
| `function` | makes a function of the caller's, known by a name, return True |

A table says a check as JSON, `{"contains": "Paris"}`, or in short, `contains: Paris`. One of the
first three, or `regex`, may stand alone: it compares with what the case has as `expected`. What an
expression or a function does to itself, it does to its own case: that one fails, and the run goes
on. A search that takes too long is killed. A function cannot be: its case fails, it goes on behind,
and until it returns it is not called again, and its other cases fail. What an outcome says never
holds the answer.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cloister.errors import SettingError
from cloister_jupyter.cases import once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cloister_jupyter.cases import Case

__all__ = ["FUNCTION_LIMIT_S", "KINDS", "LIMIT_S", "Check", "Judge", "Outcome", "parse"]

KINDS = ("exact", "contains", "json", "schema", "regex", "function")
LIMIT_S = 1.0  # for one search
FUNCTION_LIMIT_S = 10.0  # for one call
_DEAD = "BrokenPipeError"
_START_S = 60.0  # for a process to begin, on a busy machine
_LOOK_S = 0.01  # how often a wait looks whether it is to stop
_NEVER = threading.Event()
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
_TYPES: dict[str, tuple[type, ...]] = {
    "exact": (str, type(None)), "contains": (str, list, type(None)), "json": (dict, type(None)),
    "schema": (dict,), "regex": (str, type(None)), "function": (str,)}


@dataclass(frozen=True)
class Outcome:
    """Whether an answer passed, and why not: a reason, an error's type or the fields that differ.

    It quotes no answer.
    """

    passed: bool
    why: str = ""
    fields: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Check:
    """A kind, and what it compares with."""

    kind: str
    value: object = field(default=None, repr=False)  # None: what is expected of the case


def parse(text: str, line: int | None = None) -> Check:
    """Read a check as a table says it.

    Raises:
        SettingError: it is none; the line of its case is named, unless it is the default check.
    """
    short = re.fullmatch(r"\s*(\w+)\s*(?::\s*(.*))?", text, re.DOTALL)
    if short is None:
        record = _json(text)
    elif short[2] is None or short[1] not in ("json", "schema"):
        record = {short[1]: short[2]}
    else:
        record = {short[1]: _json(short[2])}
    if isinstance(record, dict) and len(record) == 1:
        (kind, value), = record.items()
        if kind in KINDS and isinstance(value, _TYPES[kind]) and value != "" and (
            not isinstance(value, list) or all(isinstance(part, str) for part in value)
        ):
            return Check(kind, value)
    which = "default check" if line is None else f"check of line {line}"
    raise SettingError(
        f"The {which} is none that is known; write one such as contains: Paris, or "
        f'{{"regex": "^[0-9]+$"}}, of the kinds {", ".join(KINDS)}.')


class Judge:
    """Judges answers; close it, or use it in a `with` statement: searches have their own process.

    `functions` are those that checks name; each is given the answer and its case, and runs in a
    thread of this process, for `function_limit_s` at most (see the module). `default` is the check,
    or the function, for a case that has none of its own; without it the answer that is wanted
    decides.
    """

    def __init__(
        self, *, functions: Mapping[str, Callable[[str, Case], bool]] | None = None,
        default: Check | Callable[[str, Case], bool] | None = None, limit_s: float = LIMIT_S,
        function_limit_s: float = FUNCTION_LIMIT_S,
    ) -> None:
        self._functions = dict(functions or {})
        if callable(default):
            self._functions[""] = default
            default = Check("function", "")
        self._default, self._search = default, _Search(limit_s)
        self._function_limit_s = function_limit_s
        self._calls: dict[str, threading.Thread] = {}  # the last one of each function

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process of the searches; the next one begins another."""
        self._search.close()

    def prepare(self, cases: Iterable[Case]) -> int:
        """Return how many of the cases can be judged, before anything is asked.

        Raises:
            SettingError: a check is none that is known, names a function that is not there, or
                has an expression or a schema that is malformed; its line is named.
        """
        count, seen = 0, set[str]()
        for case in cases:
            check = self.check_of(case)
            count += check is not None
            if check is not None and (wrong := self._wrong(check, seen)):
                raise SettingError(f"The check of line {case.line} {wrong}; correct it.")
        return count

    def check_of(self, case: Case) -> Check | None:
        """Return how a case is judged, and with what; None where nothing is wanted of it.

        Raises:
            SettingError: see `parse`; or it compares with what is expected, and nothing is, or no
                JSON object.
        """
        if case.check is None and case.expected is None and (
                self._default is None or self._default.value is None):
            return None
        check = parse(case.check, case.line) if case.check is not None else (
            self._default or Check("exact"))
        if check.value is not None:
            return check
        wanted: object = case.expected
        if check.kind == "json":
            wanted = _json(case.expected or "")
        if not isinstance(wanted, str | dict):
            kind = "a JSON object" if check.kind == "json" else "something"
            raise SettingError(
                f"The check of line {case.line} needs {kind} as what is expected; give it.")
        return Check(check.kind, wanted)

    def judge(
        self, case: Case, answer: str, stopping: threading.Event = _NEVER
    ) -> Outcome | None:
        """Judge an answer to a case; None where nothing is wanted of it.

        Where `stopping` comes before the end, what it returns says nothing of the answer.

        Raises:
            SettingError: see `parse`.
        """
        check = self.check_of(case)
        if check is None:
            return None
        kind, value = check.kind, check.value
        if kind == "exact":
            return _outcome(answer.strip() == str(value).strip(), "other text")
        if kind == "contains":
            parts = value if isinstance(value, list) else [value]
            return _outcome(all(str(part) in answer for part in parts), "text missing")
        if kind == "json":
            return _compare(answer, value)
        if kind == "function":
            return self._call(str(value), answer, case, stopping)
        if kind == "schema" and (found := _json(_unfenced(answer))) is _BROKEN:
            return Outcome(False, "no JSON")
        text = answer if kind == "regex" else json.dumps(found)
        said = self._search(kind, value, text, stopping)
        return Outcome(said == "yes", {"yes": "", "no": "no match"}.get(said, said))

    def _call(
        self, name: str, answer: str, case: Case, stopping: threading.Event
    ) -> Outcome:
        """Call a function, and wait for it; KeyboardInterrupt is the user's, who stops the run."""
        before = self._calls.get(name)
        if before is not None and before.is_alive():
            return Outcome(False, "TimeoutError of an earlier case")
        said: list[Outcome | BaseException] = []

        def call() -> None:
            try:
                said.append(_judged(self._functions[name](answer, case)))
            except BaseException as error:  # SystemExit, too: whatever it does, it does to its case
                said.append(error)

        calling = self._calls[name] = threading.Thread(target=call, daemon=True)
        calling.start()
        end_s = time.monotonic() + self._function_limit_s
        while calling.is_alive() and time.monotonic() < end_s and not stopping.is_set():
            calling.join(_LOOK_S)
        outcome = said[0] if said else TimeoutError()
        if isinstance(outcome, KeyboardInterrupt):
            raise outcome
        return outcome if isinstance(outcome, Outcome) else Outcome(False, type(outcome).__name__)

    def _wrong(self, check: Check, seen: set[str]) -> str:
        """Return what is wrong with a check, in words; empty for nothing."""
        if check.kind == "function":
            known = check.value in self._functions
            return "" if known else "names a function that the lab was not given"
        key = json.dumps([check.kind, check.value], default=str)
        if check.kind not in ("schema", "regex") or key in seen:
            return ""
        seen.add(key)
        if check.kind == "schema" and any(not ref.startswith("#") for ref in _refs(check.value)):
            return "has a schema with a $ref to elsewhere, which is never fetched"
        said = self._search(*{
            "regex": ("regex", check.value, ""), "schema": ("check", check.value, "")}[check.kind])
        if said == "ModuleNotFoundError":
            return "needs the package jsonschema"
        what = "an expression" if check.kind == "regex" else "a schema"
        return "" if said in ("yes", "no") else f"has {what} that cannot be read ({said})"


class _Search:
    """Searches by `_match.py`, in a process that is killed where one takes too long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(
        self, kind: str, pattern: object, text: str, stopping: threading.Event = _NEVER
    ) -> str:
        """Return "yes" or "no", or the type of the error."""
        with self._lock:
            said = self._ask(self._begun(), [kind, pattern, text], self._limit_s, stopping)
            if said == _DEAD:  # for no fault of this search, perhaps
                said = self._ask(self._begun(), [kind, pattern, text], self._limit_s, stopping)
            return said

    def __del__(self) -> None:
        self._end()

    def close(self) -> None:
        with self._lock:
            self._end()

    def _begun(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("_match.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            process_group=0)  # a terminal's Ctrl-C is for the run
        for first in (["regex", "", ""], ["check", {}, ""]):  # imports take their time
            self._ask(process, first, _START_S)
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], request: object, limit_s: float,
        stopping: threading.Event = _NEVER,
    ) -> str:
        done, late = threading.Event(), threading.Event()

        def watch() -> None:
            end_s = time.monotonic() + limit_s
            while not done.wait(_LOOK_S):
                if time.monotonic() >= end_s or stopping.is_set():
                    late.set()
                    process.kill()
                    return

        assert process.stdin is not None and process.stdout is not None
        threading.Thread(target=watch, daemon=True).start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except OSError:
            said = b""
        finally:
            done.set()
        if late.is_set() or not said:
            self._end()
        return said.decode().strip() or ("TimeoutError" if late.is_set() else _DEAD)

    def _end(self) -> None:
        process, self._process = getattr(self, "_process", None), None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()


_BROKEN = object()  # what no JSON is


def _json(text: str) -> object:
    """Read JSON; _BROKEN where it is none, or a key is there twice: which counts, nobody knows."""
    def refuse(constant: str) -> object:  # NaN and its like, which are none of JSON's
        raise ValueError(constant)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _BROKEN


def _unfenced(answer: str) -> str:
    """Return an answer without the fence that models put around JSON."""
    found = _FENCE.fullmatch(answer.strip())
    return found[1] if found else answer


def _judged(said: object) -> Outcome:
    """Make an outcome of what a function returned; numpy's booleans are none of Python's."""
    if type(said).__name__ in ("bool", "bool_"):
        return Outcome(bool(said))
    return Outcome(False, f"the function returned {type(said).__name__}, not True or False")


def _outcome(passed: bool, why: str) -> Outcome:
    return Outcome(passed, "" if passed else why)


def _compare(answer: str, wanted: object) -> Outcome:
    found = _json(_unfenced(answer))
    assert isinstance(wanted, dict)
    if found is _BROKEN:
        return Outcome(False, "no JSON")
    differ = tuple(name for name in wanted if not _same(wanted[name], _field(found, name)))
    return Outcome(not differ, f"{len(differ)} of {len(wanted)} fields differ" if differ else "",
                   differ)


def _field(value: object, place: str) -> object:
    """Return what stands at a place in JSON; its whole name goes before one with dots."""
    if isinstance(value, dict) and place in value:
        return value[place]
    for name in place.split("."):
        if isinstance(value, dict):
            value = value.get(name, _BROKEN)
        elif isinstance(value, list) and re.fullmatch("[0-9]{1,9}", name):
            value = value[int(name)] if int(name) < len(value) else _BROKEN
        else:
            return _BROKEN
    return value


def _same(one: object, other: object) -> bool:
    """Tell whether two values are the same JSON; for Python True is 1, and for JSON it is not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _refs(schema: object) -> list[str]:
    """Return every text that a `$ref` or its like says, anywhere in a schema."""
    found: list[str] = []
    left = [schema]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            found += [ref for name in ("$ref", "$dynamicRef", "$recursiveRef")
                      if isinstance(ref := node.get(name), str)]
            left += node.values()
        elif isinstance(node, list):
            left += node
    return found
