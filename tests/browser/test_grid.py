"""The grid in a real browser: a table pasted, asked, judged, stopped, promoted and compared."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from tests.browser.conftest import Notebook, Server
from tests.browser.test_lab import Open, violations

pytestmark = pytest.mark.slow

GRID = """from cloister_jupyter import PromptLab

def short(answer, case):
    if "London" in case.values.values():
        raise ValueError(answer)
    return len(answer) < 200

lab = PromptLab(["nano-2", "nano-1"], functions={"short": short})
lab"""
TABLE = (
    '\ufeffcity;day;expected;check\r\nParis;today;;"json: {""name"": ""GetWeather""}"\r\n'
    '"Rome; or\r\n""Roma""";tomorrow;;contains: GetWeather\r\nLondon;today;;function: short\r\n'
    'Oslo;today;"{""name"": ""PlayMusic""}";json\r\n')


def grid_of(notebook: Notebook, cell: int = 0) -> Any:
    notebook.run_cell(cell)
    lab = notebook.lab()
    lab.get_by_role("tab", name="Grid").click()
    grid = lab.locator(".cl-grid")
    grid.get_by_label("Task of the grid").wait_for()
    return grid


def ended(grid: Any, words: str = "done") -> None:
    grid.locator(f".cl-toolbar > .cl-note:has-text('{words}')").wait_for(timeout=120_000)


def answers(grid: Any) -> Any:
    return grid.get_by_role("grid", name="Answers by case and tier")


def test_a_table_is_pasted_edited_asked_judged_promoted_and_compared(
    open_notebook: Open, server: Server
) -> None:
    notebook = open_notebook("grid.ipynb", GRID, height=1400)
    grid = grid_of(notebook)
    grid.get_by_label("Templates").fill("what is the weather in {city} {day}")
    grid.get_by_label("Task of the grid").select_option("call")
    grid.get_by_label("Paste a table").fill(TABLE)
    grid.get_by_role("button", name="Read what is pasted").click()
    cases = grid.get_by_role("grid", name="Cases")
    cases.get_by_role("gridcell", name="Oslo").dblclick()
    editor = cases.locator("textarea")
    editor.fill("Bergen")
    editor.press("Enter")
    cases.get_by_role("gridcell", name="Bergen").wait_for()
    assert 'Rome; or "Roma"' in cases.inner_text()
    grid.get_by_role("button", name="Run grid").click()
    ended(grid)
    rows = answers(grid)
    assert rows.get_attribute("aria-rowcount") == "5"
    row = rows.get_by_role("row").filter(has_text="Bergen")
    row.locator(".cl-fail").first.wait_for()
    assert "1 of 1 fields differ" in row.inner_text()
    assert "ValueError" in rows.get_by_role("row").filter(has_text="London").inner_text()
    assert rows.get_by_role("row").filter(has_text="Paris").locator(".cl-pass").count() == 2
    assert "comes closest with 2 of 4 cases" in grid.locator(".cl-verdict").inner_text()
    assert grid.locator(".cl-rate").count() == 2
    grid.get_by_label("only failures").check()
    rows.locator(":scope[aria-rowcount='3']").wait_for()
    row.get_by_role("gridcell").last.dblclick()
    detail = grid.locator(".cl-detail")
    detail.get_by_role("button", name="Promote with what").click()
    grid.page.locator(".cl-alert:has-text('compares with a part')").wait_for()
    detail.get_by_role("button", name="Right: promote").first.click()
    detail.locator(".cl-note:has-text('has the case now')").wait_for()
    promoted = json.loads((server.notebooks / "regression.jsonl").read_text())
    assert promoted["task"] == "call" and "Bergen" in promoted["input"]
    grid.locator(".cl-baseline > summary").click()
    grid.get_by_role("button", name="Compare").click()
    assert "pass the same ones of 4 cases" in grid.locator(".cl-words").inner_text()
    assert "2,469,970 bytes" in grid.locator(".cl-flips").inner_text()
    for theme in ("Light", "Dark", "Dark High Contrast"):
        notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        notebook.page.wait_for_timeout(500)
        notebook.screenshot(f"grid-{theme.lower().replace(' ', '-')}", grid)
        if "TEST_AXE" in os.environ:
            assert violations(notebook) == []
    notebook.command("apputils:change-theme", theme="JupyterLab Light")
