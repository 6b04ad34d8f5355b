"""The kernel's end of the grid: what the page asks for and is told, and what bad input does."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.jupyter.test_grid import FakeWorker, Say, echo

from cloister import corpus, family
from cloister.bundle import Bundle
from cloister.errors import SettingError
from cloister.runtime.chat import Sampling
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.namespace import Kind, Namespace
from cloister_jupyter import grid as grid_module
from cloister_jupyter import grid_run
from cloister_jupyter.column import Column
from cloister_jupyter.grid_panel import GridPanel
from cloister_jupyter.turn import TURN

FORM = {"templates": "say {x}", "system": "", "check": "", "seeds": "", "temperature": 0.0,
        "max_tokens": 9, "wanted": 0.9}


class Lab:
    """What a panel needs of a lab, with what the page is sent."""

    def __init__(self, space: Namespace | None = None, **functions: Any) -> None:
        self.bundles = tuple(Column(id=str(n), name=name, path=family.bundle_path(name))
                             for n, name in enumerate(("nano-2", "nano-1")))
        self.space, self.functions = space, functions
        self.recorded: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self.panel = GridPanel(self)  # type: ignore[arg-type]

    def record(self, texts: Any) -> None:
        self.recorded += texts

    def send(self, content: dict[str, Any]) -> None:
        with self._changed:
            self.sent.append(json.loads(json.dumps(content)))
            self._changed.notify_all()

    def send_badge(self) -> None:
        self.kept = self.panel.kept

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.sent if each["type"] == f"grid.{kind}"]

    def ask(self, kind: str, **values: Any) -> None:
        """Send a message of the page, and wait until it is dealt with."""
        self.panel.receive({"type": f"grid.{kind}", **values})
        self.panel.later(lambda: None).result()

    def wait(self, kind: str, count: int = 1) -> dict[str, Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= count, 60)
        return self.of(kind)[-1]

    def run(self, *, columns: tuple[str, ...] = ("0", "1"), name: str = "grid", wait: bool = True,
            **form: Any) -> dict[str, Any]:
        before = len(self.of("over"))
        self.ask("run", run=f"run {before}", columns=columns, name=name, form={**FORM, **form})
        return self.wait("over", before + 1) if wait else {}

    def rows(self, **values: Any) -> dict[str, Any]:
        self.ask("rows", view=1, begin=0, count=100, **values)
        return self.of("rows")[-1]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what each tier says, by the name of its bundle."""

    def says(default: Say = echo, **tiers: Say) -> None:
        def worker(bundle: Path, vault: bool) -> FakeWorker:
            name = bundle.name.removesuffix(".cloister").replace("-", "_")
            return FakeWorker(tiers.get(name, default), model=name.encode().hex().ljust(64, "0"))

        monkeypatch.setattr(grid_module, "Worker", worker)

    says()
    return says


@pytest.fixture
def lab(says: Any) -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.panel.close()


@pytest.fixture
def space() -> Iterator[Namespace]:
    with local.open_vault(settings=Settings.from_environment(), create=True,
                          notify=lambda notice: None) as vault:
        yield vault.namespace()


def table(count: int) -> str:
    return "x,expected\n" + "".join(f"{n},say {n}!\n" for n in range(count))


def test_a_table_is_read_shown_edited_and_asked(lab: Lab) -> None:
    lab.ask("read", text="x,expected\n1,say 1!\n2,say two!\n")
    assert lab.of("table")[-1] == {
        "type": "grid.table", "columns": ["x", "expected", "check"], "count": 2}
    lab.ask("edit", row=1, column=1, text="say 2!")
    lab.ask("insert", row=2)
    lab.ask("edit", row=2, column=0, text="3")
    lab.ask("edit", row=2, column=2, text="contains: nothing")
    lab.ask("cases", view=0, begin=0, count=9)
    assert [row["cells"] for row in lab.of("cases")[-1]["rows"]] == [
        ["1", "say 1!", ""], ["2", "say 2!", ""], ["3", "", "contains: nothing"]]
    result = lab.run()["result"]
    assert not lab.of("invalid") and (result["done"], result["total"]) == (6, 6)
    (prompt,) = result["prompts"]
    assert [(each["name"], each["passed"], each["n"]) for each in prompt["rates"]] == [
        ("nano-1", 2, 3), ("nano-2", 2, 3)]
    assert "nano-1" in prompt["verdict"] and prompt["settled"] is False
    assert (result["differing"], result["failing"]) == (0, 1)
    rows = lab.rows(failing=True)
    assert rows["total"] == 1 and rows["rows"][0]["tiers"]["nano-1"] == {
        "passed": False, "why": "text missing", "said": [["say 3!", 1]], "more": 0}
    assert {"say 2!", "say 3", "contains: nothing"} <= set(lab.recorded)
    lab.ask("remove", row=0)
    assert lab.of("table")[-1]["count"] == 2 and lab.rows()["total"] == 3


def test_seeds_are_folded_and_templates_have_each_a_verdict(says: Any, lab: Lab) -> None:
    def draws(prompt: str, sampling: Sampling) -> Iterator[str]:
        yield "even" if (sampling.seed or 0) % 2 == 0 else "odd"

    says(nano_1=draws)
    lab.ask("read", text="x,check\n1,regex: even|say\n")
    over = lab.run(templates="say {x}\n---\nplease say {x}", seeds="1-3", temperature=1.0)
    assert [each["verdict"][:3] for each in over["result"]["prompts"]] == ["Too", "Too"]
    first, second = lab.rows(differing=True)["rows"]
    assert (first["prompt"], second["prompt"]) == (0, 1)
    assert first["tiers"]["nano-1"]["said"] == [["odd", 2], ["even", 1]]
    assert first["tiers"]["nano-2"]["said"] == [["say 1!", 3]]
    lab.ask("row", prompt=1, case=0)
    full = lab.of("row")[-1]
    assert full["asked"] == "please say 1" and full["tiers"]["nano-1"][0]["seeds"] == [1, 3]
    assert [each["passed"] for each in full["tiers"]["nano-1"]] == [False, True]


def test_a_file_with_a_mark_semicolons_quotes_and_line_ends_is_read(lab: Lab) -> None:
    text = '\ufeffx;expected\r\n"one; ""two""\r\nthree";y\r\n'
    for raw in (text.encode(), text.encode("utf-16"), b'{"x": "one; \\"two\\"\\r\\nthree"}\n'):
        lab.ask("file", base64=base64.b64encode(raw).decode())
        assert lab.of("table")[-1]["count"] == 1
        lab.ask("cell", row=0, column=0)
        assert lab.of("cell")[-1]["text"] == 'one; "two"\r\nthree'
    assert not lab.of("invalid")


@pytest.mark.parametrize(("kind", "values", "words"), [
    ("read", {"text": "x\n" + "1" * (5 << 20)}, "5,242,882 bytes and the page takes 4,194,304"),
    ("read", {"text": "zanzibar,\n1,2\n"}, "column 2 in line 1"),
    ("read", {"text": 5}, "not of its kind"), ("zanzibar", {}, "not of its kind"),
    ("file", {"base64": "zan"}, "choose it again"),
    ("file", {"base64": base64.b64encode(b"x\n\xff\n").decode()}, "UTF-8"),
    ("blank", {"templates": "zanzibar"}, "no variable"), ("blank", {"templates": "{"}, "line 1"),
    ("cell", {"row": 9, "column": 0}, "no such cell"),
    ("edit", {"row": 0, "column": 9, "text": "zanzibar"}, "no such cell"),
    ("rows", {"view": 0, "begin": 0, "count": 9}, "run the grid first"),
    ("rows", {"view": 0, "begin": 0, "count": 10**9}, "not of its kind"),
    ("take", {"name": "zanzibar"}, "give it a vault"),
    ("run", {"run": "r", "columns": ["zanzibar"], "name": "g", "form": FORM}, "no such tier"),
    ("run", {"run": "r", "columns": [], "name": "g", "form": FORM}, "at least one"),
])
def test_what_cannot_be_done_is_refused_in_a_sentence(
    lab: Lab, kind: str, values: dict[str, Any], words: str
) -> None:
    try:
        lab.ask(kind, **values)
    except SettingError as error:  # the lab tells the page
        lab.panel.send("invalid", message=str(error))
    (invalid,) = lab.of("invalid")
    assert words in invalid["message"] and "zanzibar" not in invalid["message"]


@pytest.mark.parametrize(("cases", "form", "words"), [
    ("x\n1\n", {"templates": " "}, "type a template"),
    ("x\n1\n", {"templates": "{city}"}, "line 2 has no value for the variable city"),
    ("x\n" + "y" * 100_000 + "\n", {}, "line 2 has 100,004 bytes and a tier is asked 65,536"),
    ("x\n1\n", {"check": "like: 1"}, "default check is none that is known"),
    ("x,check\n1,function: none\n", {}, "line 2 names a function that the lab was not given"),
    ("x\n1\n", {"seeds": "1 2"}, "temperature 0"), ("x\n1\n", {"seeds": "one"}, "whole numbers"),
    ("x\n1\n", {"seeds": "1-99999"}, "1,000"), ("x\n1\n", {"wanted": 1.0}, "below 100 %"),
])
def test_a_grid_that_cannot_be_asked_says_why_and_the_next_one_can(
    lab: Lab, cases: str, form: dict[str, Any], words: str
) -> None:
    lab.ask("read", text=cases)
    over = lab.run(**form)
    assert words in over["message"] and not lab.of("began")
    lab.ask("read", text="x\n1\n")
    assert lab.run()["result"]["done"] == 2


def test_a_cell_of_100_kb_is_shown_cut_and_judged_whole(lab: Lab) -> None:
    long = "y" * 100_000
    lab.ask("read", text=f"x,expected\n1,{long}\n")
    lab.ask("cases", view=0, begin=0, count=1)
    assert len(lab.of("cases")[-1]["rows"][0]["cells"][1]) < 300
    lab.ask("cell", row=0, column=1)
    assert lab.of("cell")[-1]["text"] == long
    assert lab.run()["result"]["failing"] == 1
    assert len(json.dumps(lab.rows())) < 2000


def test_a_check_function_that_raises_or_does_not_return_fails_its_cases_alone(
    says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    def raises(answer: str, case: Any) -> bool:
        raise ValueError(answer)

    monkeypatch.setattr(grid_run, "Judge", lambda **given: grid_run_judge(
        function_limit_s=0.2, **given))
    lab = Lab(raises=raises, hangs=lambda answer, case: let_go.wait(60))
    lab.ask("read", text="x,check\n1,function: raises\n2,function: hangs\n3,function: hangs\n"
                         "4,contains: say\n")
    result = lab.run(columns=("1",))["result"]
    assert result["failing"] == 3
    why = [row["tiers"]["nano-1"]["why"] for row in lab.rows()["rows"]]
    assert why == ["ValueError", "TimeoutError", "TimeoutError of an earlier case", ""]
    let_go.set()
    lab.panel.close()


grid_run_judge = grid_run.Judge


@pytest.mark.slow
def test_a_thousand_cases_that_were_stopped_go_on_from_the_vault_in_another_kernel(
    says: Any, space: Namespace
) -> None:
    lab, asked = Lab(space), list[str]()

    def stops(prompt: str, sampling: Sampling) -> Iterator[str]:
        asked.append(prompt)
        if len(asked) == 500:
            lab.panel.receive({"type": "grid.stop", "run": "run 0"})
        yield from echo(prompt, sampling)

    says(stops)
    lab.ask("read", text=table(1000))
    over = lab.run(columns=("1",), name="thousand")
    assert over["stopped"] and over["result"]["done"] == 499  # the one at hand is dropped
    assert lab.kept == "1 named grid with cases and answers"
    lab.panel.close()
    other = Lab(space)  # as after a restart
    other.ask("take", name="thousand")
    state = other.of("state")[-1]
    assert state["form"]["templates"] == "say {x}" and other.of("table")[-1]["count"] == 1000
    over = other.run(columns=("1",), name="thousand", **{
        key: state["form"][key] for key in ("check", "seeds")})
    assert not over["stopped"] and over["result"]["done"] == 1000
    assert len(asked) == 1001 and len(set(asked)) == 1000
    other.ask("forget", name="thousand")
    assert "is forgotten" in other.of("said")[-1]["message"] and other.kept == ""
    other.ask("take", name="thousand")
    assert "No grid is kept" in other.of("invalid")[-1]["message"]
    other.panel.close()


def test_what_is_kept_is_forgotten_also_unread_but_not_while_more_comes(
    says: Any, space: Namespace
) -> None:
    go_on = threading.Event()

    def waits(prompt: str, sampling: Sampling) -> Iterator[str]:
        go_on.wait(60)
        yield prompt

    says(waits)
    lab = Lab(space)
    lab.ask("read", text=table(2))
    lab.run(columns=("1",), wait=False)
    lab.wait("began")
    lab.ask("forget", name="grid")
    assert "stop it first" in lab.of("invalid")[-1]["message"]
    go_on.set()
    lab.wait("over")
    space.append(Kind.HISTORY, b"\xfflab grid grid", [b'["another format"]'])
    lab.run(columns=("1",))
    assert "forget it" in lab.of("over")[-1]["message"]
    lab.ask("forget", name="grid")
    assert lab.of("said")[-1]["message"] == "What was kept of this grid is forgotten."
    assert not space.has(Kind.HISTORY, b"\xfflab grid grid")
    lab.panel.close()


def test_without_a_vault_what_was_answered_stays_until_the_kernel_ends(
    says: Any, lab: Lab
) -> None:
    asked: list[str] = []

    def counts(prompt: str, sampling: Sampling) -> Iterator[str]:
        asked.append(prompt)
        yield prompt

    says(counts)
    lab.ask("read", text=table(5))
    lab.run(columns=("1",))
    lab.ask("edit", row=2, column=0, text="other")
    lab.run(columns=("1",))
    assert asked == ["say 0", "say 1", "say 2", "say 3", "say 4", "say other"]


def test_a_grid_waits_until_nobody_else_of_the_kernel_asks_and_stop_ends_the_wait(
    lab: Lab
) -> None:
    lab.ask("read", text=table(1))
    with TURN:
        lab.run(wait=False, columns=("1",))
        while not any(each["note"] == "waits" for each in lab.of("progress")):
            time.sleep(0.01)
        assert not lab.of("over")
        lab.ask("stop", run="another")
        lab.ask("run", run="x", columns=("1",), name="g", form=FORM)
        assert "stop it first" in lab.of("invalid")[0]["message"]
        lab.ask("stop", run="run 0")
        assert lab.wait("over")["stopped"]
    assert lab.run()["result"]["done"] == 2 and not TURN.locked()


def test_progress_says_how_many_are_done_and_how_long_it_takes(says: Any, lab: Lab) -> None:
    def slow(prompt: str, sampling: Sampling) -> Iterator[str]:
        time.sleep(0.02)
        yield prompt

    says(slow)
    lab.ask("read", text=table(50))
    lab.run()
    told = [each for each in lab.of("progress") if each["left_s"] is not None]
    assert told[0]["done"] < told[-2]["done"] <= 100 and told[-1]["left_s"] == 0
    assert 0 < told[0]["left_s"] < 20
    assert len(lab.of("progress")) < 40


def test_a_case_goes_into_the_regression_file_with_what_is_right(
    lab: Lab, tmp_path: Path
) -> None:
    path = str(tmp_path / "cases.jsonl")
    lab.ask("read", text="x,expected,check\n1,say 1!,\n2,say,contains\n")
    lab.run(columns=("1",))
    lab.ask("promote", prompt=0, case=0, tier=None, said=0, path=path)
    lab.ask("promote", prompt=0, case=1, tier="nano-1", said=0, path=path)
    lab.ask("promote", prompt=0, case=1, tier="nano-1", said=0, path=path)
    assert [each["message"][:20] for each in lab.of("said")] == [
        "cases.jsonl has the ", "cases.jsonl has the ", "cases.jsonl has just"]
    assert [(each.input, each.target) for each in corpus.read(path)] == [
        ("say 1", "say 1!"), ("say 2", "say 2!")]
    for wrong in ({"tier": None, "case": 1}, {"tier": "nano-2"}, {"said": 7}, {"path": " "},
                  {"path": str(tmp_path / "cases.csv")}, {"case": 9},
                  {"path": "~nobody-here/cases.jsonl"}, {"path": f"{'a' * 300}.jsonl"}):
        lab.ask("promote", **{"prompt": 0, "case": 0, "tier": "nano-1", "said": 0, "path": path,
                              **wrong})
    assert len(lab.of("invalid")) == 8 and len(corpus.read(path)) == 2
    assert "unexpectedly" not in str(lab.of("invalid"))


def test_two_tiers_are_compared_each_flip_beside_its_row_of_the_receipts(
    says: Any, lab: Lab
) -> None:
    def name(good: int) -> Say:
        return lambda prompt, sampling: iter((json.dumps({
            "name": "a" if int(prompt[4:]) < good else "b"}),))

    says(nano_2=name(10), nano_1=name(3))
    lab.ask("read", text="x,check\n" + "".join(
        f'{n},"json: {{""name"": ""a""}}"\n' for n in range(12)))
    lab.run(system="call")
    lab.ask("compare", before="nano-2", after="nano-1")
    told = lab.of("compared")[-1]
    assert "Of 12 cases nano-1 breaks 7 that nano-2 passes, and mends 0: nano-1 is worse" in (
        told["words"]) and "1.6 %" in told["words"]
    assert [row["line"] for row in told["rows"]] == list(range(5, 12))
    assert told["rows"][0]["receipt"] == "evaluations: call, development: intent_accuracy"
    reports = [Bundle.open(tier).receipt()["evaluations"]["call, development"]
               for tier in ("nano-2", "nano-1")]
    assert told["rows"][0]["values"] == [
        "{:.1%} \u00b1 {:.1%}".format(*(each[of]["intent_accuracy"] for of in (
            "metrics", "errors"))) for each in reports]
    sizes = (f"{Bundle.open(tier).manifest.size_bytes:,} bytes" for tier in ("nano-2", "nano-1"))
    assert ["size", *sizes] in told["receipts"]
    lab.ask("compare", before="nano-2", after="nano-2")
    assert "choose another" in lab.of("invalid")[-1]["message"]


def test_a_page_that_opens_is_told_all_and_no_word_is_in_a_repr(lab: Lab) -> None:
    lab.panel.open()
    assert lab.wait("state")["run"] is None
    lab.ask("read", text="x,expected\nzanzibar,say zanzibar!\n")
    lab.run(templates="say {x}")
    lab.panel.open()
    state = lab.wait("state", 2)
    assert state["run"]["result"]["done"] == 2 and state["run"]["columns"] == ["nano-2", "nano-1"]
    assert state["form"]["templates"] == "say {x}" and not state["run"]["running"]
    panel = lab.panel
    shown = repr((panel, panel._table, panel._form, panel._run, panel._memory, panel._grid))
    assert "zanzibar" not in shown and "say" not in shown


def test_what_fails_without_a_name_tells_no_text(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Any:
        raise RuntimeError("zanzibar")

    lab.ask("read", text=table(1))
    monkeypatch.setattr(grid_run, "Grid", fails)
    over = lab.run()
    assert "report it" in over["message"] and "zanzibar" not in over["message"]
    monkeypatch.setattr(GridPanel, "_send_table", fails)
    lab.ask("read", text=table(1))
    assert "report it" in lab.of("invalid")[-1]["message"]
