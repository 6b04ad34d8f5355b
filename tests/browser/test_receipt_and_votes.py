"""A receipt and a blind vote in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import TimeoutError as TimedOut
from tests.browser.conftest import LAB, Notebook, Server

from cloister.audit.canary import Canary, search
from cloister.bundle import Bundle

pytestmark = pytest.mark.slow

Open = Callable[..., Notebook]
THEMES = ("Light", "Dark", "Dark High Contrast")
RECEIPT = """from cloister_jupyter import ReceiptView

ReceiptView("nano-1", against="nano-2")"""
FRAMES = "{:.3f}".format(
    Bundle.open("nano-1").receipt()["evaluations"]["call, development"]["metrics"]["frame_exact"])
VAULT = """import warnings
from cloister import open_vault
from cloister_jupyter import PromptLab

warnings.simplefilter("ignore")
lab = PromptLab(["nano-2", "nano-1"], vault=open_vault(create=True))
lab"""


def check_themes(
    notebook: Notebook, name: str, selector: str, themes: Sequence[str] = THEMES
) -> None:
    """Keep a picture in each theme, in which axe finds nothing serious or critical."""
    for theme in themes:
        notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        notebook.page.wait_for_timeout(400)
        notebook.screenshot(f"{name}-{theme.lower().replace(' ', '-')}")
        if "TEST_AXE" in os.environ:
            notebook.page.evaluate(Path(os.environ["TEST_AXE"]).read_text())
            found = notebook.page.evaluate("selector => axe.run(selector)", selector)
            assert [f"{each['id']}: {node['html']} {node['failureSummary']}"
                    for each in found["violations"] if each["impact"] in ("serious", "critical")
                    for node in each["nodes"]] == [], theme
    notebook.command("apputils:change-theme", theme="JupyterLab Light")


def test_a_receipt_has_its_plots_in_every_theme_and_its_numbers_where_they_are_stripped(
    open_notebook: Open, server: Server
) -> None:
    notebook = open_notebook("receipt.ipynb", RECEIPT, height=1600)
    notebook.run_cell(0)
    output = notebook.page.locator(".jp-OutputArea-output").first
    plots = output.get_by_role("img")
    plots.first.wait_for()
    assert plots.count() == 6
    assert output.get_by_role("img", name="Scores divided by pro's").is_visible()
    widths = [plot.bounding_box()["width"] for plot in plots.all()]
    assert min(widths) > 300
    output.locator("summary").last.focus()
    notebook.page.keyboard.press("Enter")
    assert output.get_by_role("cell", name=FRAMES).first.is_visible()
    check_themes(notebook, "receipt", ".jp-OutputArea-output")
    notebook.command("docmanager:save")
    saved = json.loads(notebook.path.read_text())
    assert "<svg" in "".join(saved["cells"][0]["outputs"][0]["data"]["text/html"])

    # A notebook that came from elsewhere is not trusted: its HTML is sanitized, SVG stripped.
    saved["cells"][0]["source"] += "\n# of another hand"
    other = open_notebook("untrusted.ipynb", height=1600)
    other.command("docmanager:save")
    other.path.write_text(json.dumps(saved))
    other.command("docmanager:reload")
    output = other.page.locator(".jp-OutputArea-output").first
    output.locator("text=nats a token").first.wait_for()
    other.screenshot("receipt-untrusted")
    assert output.locator("svg").count() == 0
    assert output.evaluate("""each => [...each.querySelectorAll('figure > div')].every(
        (drawing) => drawing.offsetHeight === 0)""")  # no heap of labels without their plot
    assert output.get_by_role("rowheader", name="mean KL divergence").is_visible()
    output.locator("summary").last.click()
    assert output.get_by_role("cell", name=FRAMES).first.is_visible()


def test_a_vote_goes_by_keyboard_alone_and_names_no_tier_before_its_end(
    open_notebook: Open
) -> None:
    notebook = open_notebook("votes.ipynb", LAB)
    notebook.run_cell(0)
    lab, keyboard = notebook.lab(), notebook.page.keyboard
    lab.get_by_role("tab", name="One request").focus()
    for _ in range(9):
        if lab.locator(".cl-votes").is_visible():
            break
        keyboard.press("ArrowRight")
    panel = lab.locator(".cl-votes")
    prompts = panel.get_by_label("Prompts")
    prompts.focus()
    keyboard.type("once upon a time there was a fox\nthe king had\na boat on the lake")
    panel.get_by_label("System prompt").fill("story")
    panel.get_by_label("Tokens at most").fill("24")
    assert "nano" in panel.inner_html()  # the form names the tiers: they are chosen there
    check_themes(notebook, "votes-form", ".cl-votes", THEMES[1:2])
    prompts.focus()
    keyboard.press("Control+Enter")
    heading = panel.locator("h3")

    def shows(words: str) -> None:
        panel.locator(f"h3:has-text('{words}')").wait_for(timeout=120_000)
        assert heading.evaluate("each => each.getRootNode().activeElement !== document.body")

    shows("Pair 1 of 3")
    for answer in ("A", "B"):
        assert len(panel.get_by_role("group", name=f"Answer {answer}").inner_text()) > 10
    assert "nano" not in panel.inner_html()
    check_themes(notebook, "vote", ".cl-votes")
    heading.focus()
    for key, words in (("1", "Pair 2"), ("4", "Pair 3"), ("u", "Pair 2"), ("3", "Pair 3"),
                       ("2", "All 3 pairs")):
        keyboard.press(key)
        shows(words)
        assert "nano" not in panel.inner_html()
    assert "of 2 votes" in panel.locator(".cl-standing").inner_text()
    assert "would tell" in panel.locator(".cl-standing").inner_text()
    panel.get_by_role("button", name="show the names").focus()
    keyboard.press("Enter")
    shows("The names")
    assert "nano-1" in panel.inner_text()  # now it does
    assert "nano-2" in panel.inner_text()
    panel.locator("summary").click()
    assert [row.inner_text().split("\t")[-1] for row in panel.locator("details tbody tr").all()] \
        == ["A is better", "Tie", "B is better"]
    check_themes(notebook, "votes-end", ".cl-votes", THEMES[1:2])
    for _ in range(3):  # JupyterLab may take the focus once its theme is back
        panel.get_by_role("button", name="Begin another vote").press("Enter")
        with contextlib.suppress(TimedOut):
            prompts.wait_for(timeout=15_000)
            break
    assert prompts.input_value().startswith("once")
    notebook.command("docmanager:save")
    assert "once upon" not in notebook.path.read_text()


def test_a_vote_is_stopped_left_gone_on_with_and_forgotten(
    open_notebook: Open, server: Server
) -> None:
    canary = Canary.new("prompt")
    notebook = open_notebook("votes-kept.ipynb", VAULT)
    notebook.run_cell(0)
    lab: Any = notebook.lab()
    lab.get_by_role("tab", name="Vote").click()
    panel = lab.locator(".cl-votes")
    prompts = panel.get_by_label("Prompts")
    prompts.fill(f"{canary.text}\n" + "\n".join(f"there were {n} foxes" for n in range(200)))
    panel.get_by_label("Keep it as").fill("which one")
    prompts.press("Control+Enter")
    panel.locator("h3:has-text('answers')").wait_for()
    notebook.page.keyboard.press("Escape")
    panel.locator("h3:has-text('pairs')").wait_for(timeout=30_000)
    assert "lack an answer" in panel.inner_text()
    panel.get_by_role("button", name="Begin another vote").click()
    assert panel.get_by_label("Kept votes").input_value() == "which one"
    panel.get_by_role("button", name="Go on").click()
    panel.locator("h3:has-text('Asking')").wait_for()
    notebook.page.keyboard.press("Escape")
    panel.locator("h3:has-text('pairs')").wait_for(timeout=30_000)
    panel.get_by_role("button", name="Begin another vote").click()
    panel.get_by_role("button", name="Forget").click()
    panel.get_by_label("Kept votes").wait_for(state="hidden")
    notebook.command("docmanager:save")
    # Notebooks, log, IPython's history, vault.
    assert [str(find) for find in search(server.log.parent, [canary], least_bytes=8)] == []
