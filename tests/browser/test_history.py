"""History and export in a real browser: kept, found, taken up again, written, deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.browser.conftest import Notebook, Server
from tests.browser.test_lab import choose, column, violations, wait_for_end

from cloister import family
from cloister.audit.canary import Canary, search
from cloister.audit.notebook import TEXT
from cloister.bundle import Bundle
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Open = Callable[..., Notebook]
LAB = """import warnings
from cloister import open_vault
from cloister_jupyter import PromptLab

warnings.simplefilter("ignore")
lab = PromptLab(["nano-2", "nano-1"], vault=open_vault(create=True), namespace={!r})
lab"""  # the server's vault is that of all tests here
SAID = "Call Ada Byron at 020 7946 0958, and Zanzibar's <i>cousin</i> ADA BYRON. \x1b[31m\u202e"


def looked_at(notebook: Notebook, name: str) -> None:
    """Take a picture in each theme, and look for what keeps people out."""
    if not {"TEST_AXE", "TEST_SCREENSHOTS"} & set(os.environ):
        return
    for theme in ("Light", "Dark", "Dark High Contrast"):
        notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        notebook.page.wait_for_timeout(300)
        notebook.screenshot(f"{name}-{theme.lower().replace(' ', '-')}")
        if "TEST_AXE" in os.environ:
            assert violations(notebook) == []
    notebook.command("apputils:change-theme", theme="JupyterLab Light")
    notebook.page.set_viewport_size({"width": 640, "height": 1000})
    notebook.screenshot(f"{name}-narrow")
    if "TEST_AXE" in os.environ:
        assert violations(notebook) == []
    notebook.page.set_viewport_size({"width": 1280, "height": 1000})


def ask(lab: Any, prompt: str) -> None:
    lab.get_by_role("tab", name="One request").click()
    choose(lab, task="redact", prompt=prompt)
    lab.get_by_role("button", name="Run", exact=True).click()
    wait_for_end(lab)


def leaks(server: Server, name: str) -> list[dict[str, Any]]:
    """What `cloister lab check` finds in a notebook."""
    done = subprocess.run(
        [sys.executable, "-m", "cloister.cli", "lab", "check", name, "--json"],
        cwd=server.notebooks, capture_output=True, check=False, env={
            **os.environ, "CLOISTER_HOME": str(server.log.parent / "cloister"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    return list(json.loads(done.stdout)["findings"])


def test_runs_are_kept_found_opened_and_deleted(open_notebook: Open, server: Server) -> None:
    canary = Canary.new("prompt")
    notebook = open_notebook("history.ipynb", LAB.format("history"), f"pasted = {canary.text!r}")
    notebook.run_cell(0)
    lab = notebook.lab()
    ask(lab, canary.text)
    answer = column(lab, "nano-1").locator(".cl-answer").inner_text()
    ask(lab, SAID)
    notebook.command("docmanager:save")
    found = leaks(server, "history.ipynb")  # and in its checkpoint
    assert {(each["cell"], each["place"], each["kind"]) for each in found} == {(2, "source", TEXT)}
    bundle = Bundle.open(family.bundle_path("nano-1"))
    model = Tokenizer.from_files(bundle.tokenizer_path, bundle.template_path)
    kept = search(server.log.parent / "cloister", [canary, Canary("answer", answer)], model)
    assert kept == []
    lab.get_by_role("tab", name="History").click()
    rows = lab.locator(".cl-history tbody tr")
    rows.nth(1).wait_for()
    assert "Ada Byron" in rows.nth(0).inner_text() and "zephyr" in rows.nth(1).inner_text()
    field = lab.get_by_label("Words to find")
    field.fill("ZEPHYR quartz")
    field.press("Enter")
    lab.locator(".cl-note:has-text('1 found of 2')").wait_for()
    rows.nth(0).get_by_role("button", name="Open").click()
    opened = lab.get_by_label("The opened run")
    opened.locator(":scope:has-text('not run now')").wait_for()
    assert answer in opened.inner_text() and "not run now" in opened.inner_text()
    looked_at(notebook, "history")
    lab.get_by_role("button", name="Show in One request").click()
    lab.locator(".cl-toolbar > .cl-note:has-text('not run now')").wait_for()
    assert lab.get_by_label("Prompt", exact=True).input_value() == canary.text
    assert column(lab, "nano-1").locator(".cl-answer").inner_text() == answer
    assert "kept: " in column(lab, "nano-1").locator(".cl-state").inner_text()
    notebook.screenshot("history-again")
    delete(notebook, lab, rows)


def delete(notebook: Notebook, lab: Any, rows: Any) -> None:
    """Delete the run that is found, after a change of mind, and then all."""
    lab.get_by_role("tab", name="History").click()
    button = lab.get_by_role("button", name="Delete chosen")
    rows.nth(0).get_by_role("checkbox").check()
    lab.get_by_role("button", name="Export chosen").click()
    source = lab.get_by_label("Write", exact=True)
    assert source.locator("option:checked").inner_text() == "runs chosen in History (1)"
    lab.get_by_role("tab", name="History").click()
    button.click()
    question = lab.get_by_role("group", name="Delete for good")
    assert "Delete 1 of 2 runs" in question.inner_text()
    notebook.page.keyboard.press("Escape")
    assert question.is_hidden() and rows.count() == 1
    assert button.evaluate("button => button === document.activeElement")
    button.click()
    question.get_by_role("button", name="Delete", exact=True).click()
    lab.locator(".cl-note:has-text('0 found of 1')").wait_for()
    lab.get_by_label("Words to find").fill("")
    lab.get_by_role("button", name="Find").click()
    lab.get_by_label("All that are shown").check()
    button.click()
    question.get_by_role("button", name="Delete", exact=True).click()
    lab.locator(".cl-note:has-text('0 runs')").wait_for()
    lab.get_by_label("Keep history").uncheck()
    lab.locator(".cl-badge dd:has-text('Keep history is off')").wait_for(state="attached")


SELECT = """word => {
    const walk = document.createTreeWalker(
        document.querySelector('.cl-texts'), NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const node = walk.currentNode, at = node.data.indexOf(word);
        if (at >= 0) return getSelection().setBaseAndExtent(node, at, node, at + word.length);
    }
}"""


def test_results_are_looked_through_marked_and_written(
    open_notebook: Open, server: Server, browser: Any
) -> None:
    notebook = open_notebook("export.ipynb", LAB.format("export"))
    notebook.run_cell(0)
    lab = notebook.lab()
    ask(lab, SAID)
    lab.get_by_role("tab", name="Export").click()
    lab.get_by_role("button", name="Look for personal data").click()
    preview = lab.get_by_label("Preview")
    marks = preview.locator(".cl-black")
    marks.first.wait_for(timeout=120_000)
    assert {"Ada Byron", "020 7946 0958", "ADA BYRON"} <= set(marks.all_inner_texts())
    preview.get_by_label("Also replace").fill("CALL")  # which no tier proposes
    preview.get_by_role("button", name="Add").click()
    marks.locator(":scope:text-is('Call')").first.wait_for()
    notebook.page.evaluate(SELECT, "cousin")
    preview.get_by_role("button", name="Replace what is selected").click()
    marks.locator(":scope:text-is('cousin')").first.wait_for()
    marks.last.scroll_into_view_if_needed()
    looked_at(notebook, "export")
    marks.locator(":scope:text-is('cousin')").first.click()
    marks.locator(":scope:text-is('cousin')").first.wait_for(state="detached")
    write = lab.get_by_role("button", name="Write file")
    write.click()
    lab.locator(".cl-written:has-text('none is in it')").wait_for()
    notebook.screenshot("export-written")
    write.click()
    lab.locator(".cl-alert:has-text('exists already')").wait_for()
    text = (server.notebooks / "results.html").read_text("utf-8")
    assert "cousin" in text and "[NAME 1]" in text
    assert not [gone for gone in ("byron", "call ", "7946") if gone in text.lower()]
    lab.get_by_label("Left as it is").check()
    lab.get_by_label("As", exact=True).select_option("csv")
    lab.get_by_role("button", name="Write file, with personal data").click()
    lab.locator(".cl-written:has-text('Nothing was replaced')").wait_for()
    assert "Ada Byron" in (server.notebooks / "results.csv").read_text("utf-8")
    for scheme in ("light", "dark"):
        see_page(browser, server.notebooks / "results.html", scheme)


def see_page(browser: Any, path: Path, scheme: str) -> None:
    """Open a page that was written: it asks for nothing, and keeps nobody out."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1000, "height": 700})
    page, said = context.new_page(), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.append(request.url))
    page.goto(path.as_uri())
    assert page.get_by_role("table").is_visible() and said == [path.as_uri()]
    if folder := os.environ.get("TEST_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"page-{scheme}.png")
    if axe := os.environ.get("TEST_AXE"):
        page.evaluate(Path(axe).read_text())
        found = page.evaluate("() => axe.run()")["violations"]
        assert [each for each in found if each["impact"] in ("serious", "critical")] == []
    context.close()
