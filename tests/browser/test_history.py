"""History and export in a real browser."""

from __future__ import annotations

import os
from collections.abc import Callable
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
