"""History and export in a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.browser.conftest import Notebook, Server
from tests.browser.test_lab import choose, column, violations, wait_for_end

from cloister import family
from cloister.audit.canary import Canary, search
from cloister.bundle import Bundle
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Open = Callable[..., Notebook]
LAB = """import warnings
from cloister import open_vault
from cloister_jupyter import PromptLab

warnings.simplefilter("ignore")
lab = PromptLab(["nano-2", "nano-1"], vault=open_vault(create=True))
lab"""


def looked_at(notebook: Notebook, name: str) -> None:
    """Take a picture in both themes, and look for what keeps people out."""
    for theme in ("Light", "Dark", "Dark High Contrast"):
        notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        notebook.page.wait_for_timeout(500)
        notebook.screenshot(f"{name}-{theme.lower().replace(' ', '-')}")
        if "TEST_AXE" in os.environ:
            assert violations(notebook) == []
    notebook.command("apputils:change-theme", theme="JupyterLab Light")


def ask(lab: Any, prompt: str) -> None:
    lab.get_by_role("tab", name="One request").click()
    choose(lab, task="redact", prompt=prompt)
    lab.get_by_role("button", name="Run", exact=True).click()
    wait_for_end(lab)


def test_runs_are_listed_found_opened_and_deleted(open_notebook: Open, server: Server) -> None:
    notebook = open_notebook("history.ipynb", LAB)
    notebook.run_cell(0)
    lab, canary = notebook.lab(), Canary.new("prompt")
    ask(lab, canary.text)
    answer = column(lab, "nano-1").locator(".cl-answer").inner_text()
    ask(lab, "Call <b>Ada Byron</b> at 020 7946 0958.")
    lab.get_by_role("tab", name="History").click()
    rows = lab.locator(".cl-list tbody tr")
    rows.nth(1).wait_for()
    assert "Ada Byron" in rows.nth(0).inner_text() and "zephyr" in rows.nth(1).inner_text()
    assert "nano-2, nano-1" in rows.nth(0).inner_text()
    search_field = lab.get_by_label("Words to find")
    search_field.fill("ZEPHYR quartz")
    search_field.press("Enter")
    lab.locator(".cl-note:has-text('1 found of 2')").wait_for()
    rows.nth(0).get_by_role("button", name="Open").click()
    kept = lab.get_by_label("The opened run")
    assert answer in kept.inner_text() and "not run now" in kept.inner_text()
    looked_at(notebook, "history")
    lab.get_by_role("button", name="Show in One request").click()
    lab.locator(".cl-toolbar > .cl-note:has-text('not run now')").wait_for()
    assert lab.get_by_label("Prompt", exact=True).input_value() == canary.text
    assert column(lab, "nano-1").locator(".cl-answer").inner_text() == answer
    assert "kept: " in column(lab, "nano-1").locator(".cl-state").inner_text()
    bundle = Bundle.open(family.bundle_path("nano-1"))
    model = Tokenizer.from_files(bundle.tokenizer_path, bundle.template_path)
    notebook.command("docmanager:save")
    assert search(server.log.parent, [canary, Canary("answer", answer)], model) == []
    lab.get_by_role("tab", name="History").click()
    rows.nth(0).get_by_role("checkbox").check()
    lab.get_by_role("button", name="Delete chosen").click()
    question = lab.get_by_role("group", name="Delete for good")
    assert "Delete 1 of 2 runs" in question.inner_text()
    notebook.page.keyboard.press("Escape")
    assert question.is_hidden() and rows.count() == 1
    lab.get_by_role("button", name="Delete chosen").click()
    question.get_by_role("button", name="Delete", exact=True).click()
    lab.locator(".cl-note:has-text('0 found of 1')").wait_for()
    search_field.fill("")
    lab.get_by_role("button", name="Find").click()
    lab.get_by_label("All that are shown").check()
    lab.get_by_role("button", name="Delete chosen").click()
    question.get_by_role("button", name="Delete", exact=True).click()
    lab.locator(".cl-note:has-text('0 runs')").wait_for()
    lab.get_by_label("Keep history").uncheck()
    lab.locator(".cl-badge dd:has-text('Keep history is off')").wait_for(state="attached")


SAID = "Call Ada Byron at 020 7946 0958, and Zanzibar's <i>cousin</i> ADA BYRON. \x1b[31m\u202e"


def axe(page: Any) -> list[str]:
    """What axe finds serious or critical in a whole page."""
    page.evaluate(Path(os.environ["TEST_AXE"]).read_text())
    return [f"{each['id']}: {node['html']}" for each in page.evaluate(
        "() => axe.run()")["violations"] if each["impact"] in ("serious", "critical")
        for node in each["nodes"]]


def test_results_are_looked_through_marked_and_written(
    open_notebook: Open, server: Server, browser: Any
) -> None:
    notebook = open_notebook("export.ipynb", LAB)
    notebook.run_cell(0)
    lab = notebook.lab()
    ask(lab, SAID)
    lab.get_by_role("tab", name="Export").click()
    lab.get_by_role("button", name="Look for personal data").click()
    preview = lab.get_by_label("Preview")
    marks = preview.locator(".cl-black")
    marks.first.wait_for(timeout=120_000)
    assert {"Ada Byron", "020 7946 0958", "ADA BYRON"} <= set(marks.all_inner_texts())
    preview.get_by_label("Also replace").fill("zanzibar")
    preview.get_by_role("button", name="Add").click()
    marks.locator(":scope:text-is('Zanzibar')").first.wait_for()
    notebook.page.evaluate("""() => {
        const walk = document.createTreeWalker(
            document.querySelector('.cl-texts'), NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) {
            const node = walk.currentNode, at = node.data.indexOf('cousin');
            if (at >= 0) return getSelection().setBaseAndExtent(node, at, node, at + 6);
        }
    }""")
    preview.get_by_role("button", name="Replace what is selected").click()
    marks.locator(":scope:text-is('cousin')").first.wait_for()
    looked_at(notebook, "export")
    marks.locator(":scope:text-is('cousin')").first.click()
    preview.get_by_role("checkbox", name="Replace cousin").wait_for()
    marks.locator(":scope:text-is('cousin')").first.wait_for(state="detached")
    lab.get_by_role("button", name="Write file").click()
    lab.locator(".cl-written:has-text('none is in it')").wait_for()
    lab.get_by_role("button", name="Write file").click()
    lab.locator(".cl-alert:has-text('exists already')").wait_for()
    text = (server.notebooks / "results.html").read_text("utf-8")
    assert "cousin" in text and "[NAME 1]" in text
    for gone in ("byron", "zanzibar", "7946"):
        assert gone not in text.lower()
    lab.get_by_label("Left as it is").check()
    lab.get_by_label("As", exact=True).select_option("csv")
    lab.get_by_role("button", name="Write file, with personal data").click()
    lab.locator(".cl-written:has-text('Nothing was replaced')").wait_for()
    assert "Ada Byron" in (server.notebooks / "results.csv").read_text("utf-8")
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 900, "height": 700})
        page, said = context.new_page(), list[str]()
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("request", lambda request, said=said: said.append(request.url))
        page.goto((server.notebooks / "results.html").as_uri())
        assert page.get_by_role("table").is_visible()
        assert said == [(server.notebooks / "results.html").as_uri()]  # nothing else was asked for
        if "TEST_SCREENSHOTS" in os.environ:
            page.screenshot(path=Path(os.environ["TEST_SCREENSHOTS"]) / f"page-{scheme}.png")
        if "TEST_AXE" in os.environ:
            assert axe(page) == []
        context.close()
