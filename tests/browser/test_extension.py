"""The side panel, badge, commands and launcher card, against a real vault, in a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser.conftest import OPTIONS, local
from tests.lab_server import TOKEN, LabServer, keep, settings_of, started

from cloister.audit.canary import Canary, search
from cloister.vault.local import open_vault

pytestmark = pytest.mark.slow

PASSPHRASE = "Tonquedec-Quiberon"
ASKED = "wake me up at eight"
HOSTILE = "<img src=x onerror=window.pwned=1> \u202eevil"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    base = tmp_path_factory.mktemp("lab")
    with open_vault(settings=settings_of(base, PASSPHRASE), create=True, notify=print) as vault:
        keep(vault.namespace("other"), HOSTILE, "said")
    # One that a model took part in.
    subprocess.run(
        [sys.executable, "-m", "cloister.cli", "chat", "nano-1", "--session", "mornings",
         "--system", "call", "--json"], input=f"{ASKED}\n".encode(), check=True,
        capture_output=True, env={
            **os.environ, "CLOISTER_HOME": str(settings_of(base).home),
            "CLOISTER_PASSPHRASE": PASSPHRASE,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    with started(base, "--expose-app-in-browser") as running:
        yield running


@pytest.fixture
def page(server: LabServer, browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A page of a browser that keeps a profile, which is searched in the end."""
    asked: list[str] = []
    context = browser.browser_type.launch_persistent_context(
        tmp_path, viewport={"width": 1280, "height": 1000}, **OPTIONS)
    context.on("request", lambda request: asked.append(request.url))
    context.request.post(
        f"http://127.0.0.1:{server.port}/cloister/api/vault/lock", data={},
        headers={"Authorization": f"token {TOKEN}"})
    opened = context.new_page()
    opened.on("websocket", lambda socket: asked.append(socket.url))
    opened.set_default_timeout(30_000)
    opened.goto(f"http://127.0.0.1:{server.port}/lab?token={TOKEN}&reset")
    opened.locator(".cx-badge:text('guarded')").wait_for(timeout=90_000)
    # Until then JupyterLab moves the focus.
    opened.evaluate("() => jupyterapp.restored.then(() => null)")
    opened.locator(".jp-LauncherCard").first.wait_for()
    yield opened
    opened.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")
    control = Canary.new("control")
    opened.evaluate("text => localStorage.setItem('control', text)", control.text)
    context.close()
    assert not [url for url in asked if not local(url)]
    secrets = ("mornings", "evil", PASSPHRASE)
    assert not [url for url in asked if any(secret in url for secret in (*secrets, "img"))]
    texts = [Canary(text, text) for text in ("mornings", HOSTILE, PASSPHRASE, ASKED)]
    finds = search(tmp_path, [control, *texts], least_bytes=8)  # shorter ones are by chance
    assert {find.way for find in finds} == {"control"}
    assert any("/cloister/api/vault/list" in url for url in asked)


def command(page: Any, name: str) -> None:
    """Choose one of ours in the palette, by keyboard."""
    page.keyboard.press("Control+Shift+c")
    page.keyboard.type(name)
    page.locator(f".lm-CommandPalette-item:has-text('{name}')").first.wait_for()
    page.keyboard.press("Enter")


def choose(page: Any, theme: str) -> None:
    page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
                  ".then(() => null)", f"JupyterLab {theme}")


def screenshot(page: Any, name: str) -> None:
    if folder := os.environ.get("TEST_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def violations(page: Any) -> list[str]:
    """What axe finds serious or critical in the panel and the badge."""
    result = page.evaluate("() => axe.run({include: [['.cx-panel'], ['.cx-badge']]})")
    return [f"{each['id']}: {node['html']} {node['failureSummary']}"
            for each in result["violations"] if each["impact"] in ("serious", "critical")
            for node in each["nodes"]]


def unlock(page: Any, passphrase: str = PASSPHRASE) -> Any:
    """Show the panel with the vault open."""
    panel = page.locator(".cx-panel")
    if not panel.is_visible():
        page.locator(".cx-badge").click()
    panel.get_by_label("Passphrase").fill(passphrase)
    page.keyboard.press("Enter")
    return panel


def test_the_panel_opens_the_vault_and_exports_and_forgets_what_it_is_told_to(
    page: Any, server: LabServer
) -> None:
    panel = unlock(page, "Tonquedec-Quimper")
    panel.get_by_role("status").filter(has_text="not the vault's").wait_for()
    assert panel.get_by_label("Passphrase").input_value() == ""
    unlock(page)
    panel.locator("li").nth(1).wait_for()
    rows = panel.locator("li").all_inner_texts()
    assert any("mornings" in row and "kB" in row and "hour" in row for row in rows)
    assert any("<img src=x" in row and "other" in row and "\u202e" not in row for row in rows)
    assert not page.evaluate("() => window.pwned") and panel.locator("img").count() == 0
    figures = panel.get_by_role("table").last.inner_text()
    assert "nano-1" in figures and "1.80 B" in figures

    panel.get_by_role("button", name="Export mornings").click()
    page.locator(".jp-Dialog input").fill("out.json")
    page.keyboard.press("Enter")
    panel.get_by_role("status").filter(has_text="out.json").wait_for()
    said = json.loads((server.files / "out.json").read_text())["messages"]
    assert said[0]["content"] == ASKED and said[1]["role"] == "assistant"

    panel.get_by_role("button", name="Forget mornings").focus()
    page.keyboard.press("Enter")
    page.locator(".jp-Dialog:has-text('mornings')").wait_for()
    page.keyboard.press("Escape")
    assert panel.locator("li").count() == 2
    command(page, "Forget a Conversation")
    page.locator(".jp-Dialog select").select_option(index=0 if "mornings" in rows[0] else 1)
    page.locator(".jp-Dialog button:has-text('Go on')").click()
    page.locator(".jp-Dialog button:has-text('Forget')").click()
    panel.get_by_role("status").filter(has_text="It is gone").wait_for()
    assert "mornings" not in panel.inner_text()
    with open_vault(settings=settings_of(server.base, PASSPHRASE)) as vault:
        assert [space.name for space in vault.namespaces() if space.sizes()] == ["other"]

    panel.get_by_role("button", name="Lock").click()
    panel.get_by_label("Passphrase").wait_for()
    for secret in (PASSPHRASE, "Tonquedec-Quimper", "mornings", ASKED, "evil"):
        assert secret not in server.log


def test_the_card_opens_a_lab_and_its_notebook_is_searched_for_leaks(
    page: Any, server: LabServer
) -> None:
    assert page.evaluate("() => document.documentElement.translate") is False
    unlock(page).locator("li").first.wait_for()
    page.locator(".jp-LauncherCard:has-text('Prompt Lab')").click()
    page.locator(".cloister-lab").wait_for(timeout=90_000)
    assert page.locator(".cloister-lab").get_by_role("button", name="Run").is_enabled()
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save').then(() => null)")
    command(page, "Check This Notebook for Leaks")
    page.locator(".jp-Dialog:has-text('Nothing was found in Untitled.ipynb')").wait_for()
    screenshot(page, "leak-check")
    page.keyboard.press("Escape")
    path = server.files / "Untitled.ipynb"
    notebook = json.loads(path.read_text())
    assert "PromptLab()" in "".join(notebook["cells"][0]["source"])
    notebook["cells"][0]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["anne@pontrieux.bzh"]}]
    path.write_text(json.dumps(notebook))
    command(page, "Check This Notebook for Leaks")
    page.locator(".jp-Dialog td:text-is('email')").wait_for()
    assert "nbstripout" in page.locator(".jp-Dialog").inner_text()
    page.keyboard.press("Escape")


@pytest.mark.skipif("TEST_AXE" not in os.environ, reason="TEST_AXE does not name an axe.min.js")
def test_axe_finds_nothing_serious_in_three_themes_locked_and_open(page: Any) -> None:
    page.evaluate(Path(os.environ["TEST_AXE"]).read_text())
    page.locator(".cx-badge").focus()
    page.keyboard.press("Enter")
    panel = page.locator(".cx-panel")
    panel.get_by_label("Passphrase").wait_for()
    for theme in ("Light", "Dark", "Dark High Contrast"):
        choose(page, theme)
        page.wait_for_timeout(500)
        assert violations(page) == []
        if theme == "Light":
            unlock(page)
            panel.locator("li").first.wait_for()
            panel.locator("details").evaluate_all("all => all.forEach(each => each.open = true)")
            assert violations(page) == []
        screenshot(page, f"panel-{theme.lower().replace(' ', '-')}")
    assert panel.evaluate("node => node.scrollWidth <= node.clientWidth")
    choose(page, "Light")
