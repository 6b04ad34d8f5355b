"""What a notebook shows of an object: its figures, and nothing that anybody said."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from IPython.core.formatters import DisplayFormatter
from tests.conftest import make_bundle

from cloister import Bundle, Checkpoint, Engine, Message, Session, family
from cloister.distill.loop import Run
from cloister.distill.run import DistillReport
from cloister.evaluate import report as reports
from cloister.evaluate.tasks import Score
from cloister.example import Example
from cloister.export.check import CheckReport, Divergences
from cloister.export.parts import Gap
from cloister.message import ToolCall
from cloister.quantize.apply import Coverage, QuantizeReport
from cloister.runtime.chat import Ask, Token
from cloister.runtime.client import Worker
from cloister.tiers import ladder
from cloister_jupyter.cases import Case, Template
from cloister_jupyter.column import Column
from cloister_jupyter.events import Delta
from cloister_jupyter.grid import Grid, Plan
from cloister_jupyter.kept import Answer
from cloister_jupyter.request import Request
from cloister_jupyter.runs import Runs

CANARY = "the-canary-of-this-test"


def shown(thing: object) -> dict[str, str]:
    """All forms in which IPython shows a thing."""
    forms: dict[str, str] = DisplayFormatter().format(thing)[0]
    return forms


def run() -> Run:
    return Run(losses=[2.0, 1.5], seconds=3.0, tokens=1234)


def report_of_each_kind() -> list[tuple[Any, Sequence[str]]]:
    shape = ladder()["nano-1"]
    rows = tuple(Coverage(tensor=name, shape=(10, 20), bits=bits, group=None, size_bytes=200)
                 for name, bits in (("a", 4), ("b", 4), ("c", 32)))
    score = Score(value=0.875, error=0.01, n=8)
    return [
        (reports.Report(model="x", n=8, tasks={"call": {"exact": score}}), ("0.875 ± 0.01",)),
        (QuantizeReport(identity="ab", recipe="8da8w", rows=rows, run=run()),
         ("8.00, scales", "2 steps on 1,234 tokens", "in 32 bits")),
        (DistillReport(identity="ab", shape=shape, run=run(), teacher=1.0, before=2.0, after=1.25,
                       too_long=("a.jsonl:3",)), ("1.2500", "1, longer")),
        (CheckReport(parts=7, worst=Gap("head", 1e-6), constants_bytes=5, parent=None,
                     divergences=Divergences(program_from_checkpoint=divergence())),
         ("7; the worst is head", "99.00% the same")),
    ]


def divergence() -> Any:
    class Fixed:
        mean_kld, top1 = 0.001, 0.99

    return Fixed()


@pytest.mark.parametrize(("report", "parts"), report_of_each_kind(),
                         ids=lambda each: type(each).__name__)
def test_a_report_shows_its_figures_in_both_forms(report: Any, parts: Sequence[str]) -> None:
    forms = shown(report)
    assert set(forms) == {"text/plain", "text/html"}
    for part in parts:
        assert all(part in form for form in forms.values()), part
    ET.fromstring(forms["text/html"])


def test_bundle_and_checkpoint_show_what_they_are() -> None:
    bundle, checkpoint = Bundle.open("nano-1"), Checkpoint.open("nano-1")
    size = f"{bundle.manifest.size_bytes:,} bytes"
    for form in shown(bundle).values():
        for part in ("8da4w-g32", size, "xnnpack", "1,024 tokens"):
            assert part in form
    assert "not quantized" in shown(checkpoint)["text/html"]
    checkpoint.report = report_of_each_kind()[1][0]  # as `quantize` leaves it
    assert "2 steps" in shown(checkpoint)["text/plain"]
    assert repr([bundle, checkpoint]) == "[Bundle('nano-1.cloister'), Checkpoint('nano-1')]"


def test_what_a_file_says_is_escaped(tmp_path: Path, tokenizer_dir: Path) -> None:
    bundle = make_bundle(tmp_path / "x.cloister", tokenizer_dir, name="<img src=x>")
    assert "<img" not in shown(bundle)["text/html"]
    assert "&lt;img" in shown(bundle)["text/html"]


@pytest.mark.slow
def test_nothing_that_was_said_is_in_any_form_of_what_holds_it() -> None:
    engine = Engine(family.bundle_path("nano-1"))
    session = Session(engine, system=CANARY)
    tokens = list(session.stream(f"say {CANARY}", max_tokens=4))
    assert any(CANARY in message.content for message in session.messages)  # it is there
    message = Message(role="user", content=CANARY, tool_calls=(
        ToolCall(name="x", arguments={"y": CANARY}),))
    plan = Plan(prompts=(Template(CANARY + " {x}"),), system=CANARY, cases=(
        Case(line=1, values={"x": CANARY}, expected=CANARY, check=CANARY),))
    column = Column(id="0", name="nano-1", path=family.bundle_path("nano-1"))
    things = [
        session, engine, engine.bundle, engine.tokenizer, session.stats, tokens, message,
        Token(1, CANARY, 0.0), Ask.of(CANARY, schema={"const": CANARY}),
        Example(task="call", input=CANARY, target=CANARY),
        plan, plan.prompts, plan.cases, Grid(plan, {"nano-1": column.path}),
        Answer(tier="x", place=(0, 0, None), text=CANARY),
        Request(run="1", columns=("0",), prompt=CANARY, system=CANARY),
        Delta(run="1", seq=0, column="0", texts=(CANARY,)), Runs((column,), lambda event: None),
        Worker(column.path).session(system=CANARY),
    ]
    assert f"{len(engine.cached):,} tokens" in shown(engine)["text/html"]
    said = "".join(token.text for token in tokens)
    for thing in [*things, things]:
        for form in (*shown(thing).values(), repr(thing), str(thing)):
            assert CANARY not in form, type(thing)
            assert len(said) < 4 or said not in form, type(thing)
