"""The C++ glue of `cloister embed`, built against the wheel: what it answers and what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import tokenizers
import torch
from tests.phone import wheel
from tests.phone.golden import spoken

from cloister import reference
from cloister.bundle import Bundle
from cloister.message import Message
from cloister.prompt_format import assemble
from cloister.runtime import _executorch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(wheel.missing()), reason=f"this machine lacks {wheel.missing()}"),
]

SAID = ("Is it cold?", "Who are you?", "Tell me a story")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(reference.bundle_path("nano-1"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Path:
    return wheel.embedded(bundle, tmp_path_factory.mktemp("cpp"))


@pytest.fixture(scope="module")
def drive(glue: Path) -> Path:
    return wheel.build(glue, glue.parent / "build") / "drive"


@dataclass
class Turn:
    """What came of a line: the pieces of the answer, and how it ended or what was refused."""

    pieces: list[bytes] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.decode() for piece in self.pieces)  # each is whole characters


def driven(drive: Path, model: Path, *lines: str, **options: object) -> list[Turn]:
    """Return what came of the start, and of each line that was said.

    Raises:
        ChildProcessError: the process did not end well; the signal's name, or the code.
    """
    words = [str(word) for pair in {"directory": model, **options}.items() for word in pair]
    done = subprocess.run([drive, *words], input="\n".join(lines), text=True, capture_output=True,
                          env=ENVIRONMENT)
    if done.returncode:
        raise ChildProcessError(
            signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr)
    turns = [Turn()]
    for event in filter(None, done.stdout.splitlines()):
        if event.startswith("piece "):
            turns[-1].pieces.append(bytes(map(int, event.split()[1].rstrip(",").split(","))))
            continue
        turns[-1].events.append(event)
        if event.split()[0] in ("ready", "result", "thrown", "refused"):
            turns.append(Turn())
    return turns[:-1]


class Reference:
    """Greedy decoding by Cloister's own runtime, on ids."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.plain = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
        self.program = _executorch.load(
            bundle.path / bundle.manifest.programs[0].file, bundle.manifest.shape.layers, threads=1)

    def ids(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids

    def answer(self, ids: list[int], limit: int = 256) -> list[int]:
        """Return the answer to `ids`, with the token that ends it."""
        for start, token in enumerate(ids):
            logits = self.program.forward(torch.tensor([[token]]), start)
        out: list[int] = []
        for start in range(len(ids), len(ids) + limit):
            out.append(int(logits.argmax()))
            if out[-1] in self.bundle.manifest.eos:
                break
            logits = self.program.forward(torch.tensor([out[-1:]]), start)
        return out

    def text(self, ids: list[int]) -> str:
        ended = ids[-1] in self.bundle.manifest.eos
        return self.plain.decode(ids[:-1] if ended else ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def reference_(bundle: Bundle) -> Reference:
    return Reference(bundle)


def turn(bundle: Bundle, text: str) -> str:
    format_ = bundle.manifest.prompt_format
    assert format_ is not None
    return format_.user.before + text + format_.user.after + format_.answer


def after(bundle: Bundle) -> str:
    format_ = bundle.manifest.prompt_format
    assert format_ is not None
    return format_.assistant.after


def events(turns: list[Turn]) -> list[str]:
    return [" ".join(each.events[-1].split()[:2]) for each in turns[1:]]


@pytest.mark.parametrize("load", ["mapped", "file"])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_golden_answers_are_given(
        drive: Path, glue: Path, bundle: Bundle, load: str, cache: str) -> None:
    before, between = turn(bundle, "\0").split("\0")
    asked = [each for each in spoken(bundle)
             if each.prompt.startswith(before) and each.prompt.endswith(between)]
    assert len(asked) == len(bundle.golden())
    for each in asked:
        text = each.prompt.removeprefix(before).removesuffix(between)
        start, said = driven(drive, glue / "model", f"say 0 {text}", load=load, cache=cache,
                             limit=each.tokens)
        assert start.events[-1] == "ready"
        assert said.text == each.answer.removesuffix(after(bundle))


def test_a_conversation_goes_on_where_it_was(
        drive: Path, glue: Path, bundle: Bundle, reference_: Reference) -> None:
    turns = driven(drive, glue / "model", *(f"say 0 {text}" for text in SAID), limit=60)
    ids: list[int] = []
    for number, (text, said) in enumerate(zip(SAID, turns[1:], strict=True)):
        ids += reference_.ids((after(bundle) if number else "") + turn(bundle, text))
        answer = reference_.answer(ids, 60)
        assert said.text == reference_.text(answer)
        ids += answer[:-1] if answer[-1] in bundle.manifest.eos else answer


@pytest.mark.parametrize("how", ["stop", "limit", "throw"])
def test_after_a_stop_the_model_has_read_what_was_shown_and_no_more(
        drive: Path, glue: Path, bundle: Bundle, reference_: Reference, how: str) -> None:
    lines = [f"{'say' if how == 'limit' else how} 3 {SAID[2]}", f"say 0 {SAID[1]}"]
    turns = driven(drive, glue / "model", *lines, limit=3 if how == "limit" else 40)
    first = reference_.ids(turn(bundle, SAID[2]))
    shown = reference_.answer(first, 3)
    assert len(shown) == 3
    assert turns[1].text == reference_.text(shown)
    assert events(turns)[0] == {
        "stop": "result stopped", "limit": "result limit", "throw": "thrown the"}[how]
    second = [*first, *shown, *reference_.ids(after(bundle) + turn(bundle, SAID[1]))]
    wanted = reference_.answer(second, 3 if how == "limit" else 40)
    assert turns[2].text == reference_.text(wanted)
