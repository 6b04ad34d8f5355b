"""The lab in a real browser: typed, run, stopped, and nothing of it left on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.browser.conftest import LAB, Notebook, Server

pytestmark = pytest.mark.slow

Open = Callable[..., Notebook]


def choose(lab: Any, *, task: str = "call", prompt: str = "wake me up at eight") -> None:
    lab.get_by_label("Prompt", exact=True).fill(prompt)
    lab.get_by_label("Task").select_option(task)


def column(lab: Any, name: str) -> Any:
    return lab.locator(".cl-column", has=lab.page.locator(f"h3:text-is('{name}')"))


def wait_for_end(lab: Any, words: str = "done") -> None:
    lab.locator(f".cl-toolbar > .cl-note:text-is('{words}')").wait_for(timeout=120_000)


def test_a_request_streams_into_a_column_a_tier_and_ends_with_figures(
    open_notebook: Open, server: Server
) -> None:
    notebook = open_notebook("flow.ipynb", LAB)
    notebook.run_cell(0)
    lab = notebook.lab()
    assert lab.get_by_role("button", name="Run").is_enabled()
    assert lab.get_by_role("button", name="Stop").is_visible()
    choose(lab)
    lab.get_by_label("Prompt", exact=True).press("Control+Enter")
    wait_for_end(lab)
    notebook.screenshot("flow")
    for name in ("nano-2", "nano-1"):
        answered = column(lab, name)
        assert "{" in answered.locator(".cl-answer").inner_text()
        figures = answered.locator(".cl-figures").inner_text()
        for part in ("first token", "tokens/s", "peak memory", "bundle", "cold"):
            assert part in figures
    assert "guard tier" in lab.locator(".cl-badge summary").inner_text()
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    assert "warm" in column(lab, "nano-1").locator(".cl-figures").inner_text()
