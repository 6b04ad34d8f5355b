"""A Jupyter server on loopback, a notebook with a lab in it, and a real browser before it.

Whatever asks for anything that is not on this machine fails the test that made it ask.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
OPTIONS: dict[str, Any] = {"executable_path": CHROMIUM, "headless": True, "args": [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"]}
TOKEN = "a-token-for-the-tests"
LAB = """from cloister_jupyter import PromptLab

lab = PromptLab(["nano-2", "nano-1"])
lab"""
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"},
    # The hardest case: the notebook file is given all that widgets hold.
    "@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": True},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


@dataclass
class Server:
    """A running server, and what lies on its disk."""

    url: str
    notebooks: Path
    log: Path
    ipython: Path
    settings: Path
    process: subprocess.Popen[bytes]

    def write(self, name: str, *cells: str) -> Path:
        """Write a notebook of code cells."""
        path = self.notebooks / name
        path.write_text(json.dumps({
            "nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {
                "name": "python3", "display_name": "Python 3", "language": "python"}},
            "cells": [{
                "cell_type": "code", "id": f"cell-{index}", "metadata": {}, "outputs": [],
                "execution_count": None, "source": source,
            } for index, source in enumerate(cells)],
        }))
        return path


@dataclass
class Notebook:
    """A notebook in a page of the browser."""

    page: Any
    path: Path
    received: list[int] = field(default_factory=list)  # sizes of messages from the kernel, bytes

    def command(self, name: str, **arguments: Any) -> Any:
        """Run one of JupyterLab's commands."""
        return self.page.evaluate(
            "([name, given]) => jupyterapp.commands.execute(name, given).then(() => null)",
            [name, arguments])

    def run_cell(self, index: int, *, wait: bool = True) -> None:
        """Run a cell, and wait until it has."""
        self.page.evaluate("""([index, wait]) => {
            const notebook = jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = index;
            const done = jupyterapp.commands.execute('notebook:run-cell');
            return wait ? done.then(() => null) : null;
        }""", [index, wait])

    def lab(self, index: int = 0) -> Any:
        """The lab that stands at `index` among those of the page."""
        found = self.page.locator(".cloister-lab").nth(index)
        found.wait_for(timeout=60_000)
        return found

    def kernel(self, code: str) -> None:
        """Evaluate JavaScript of the kernel's connection `kernel`, to its end."""
        self.page.evaluate(
            "code => new Function('kernel', `return ${code}`)("
            "jupyterapp.shell.currentWidget.sessionContext.session.kernel).then(() => null)", code)

    def screenshot(self, name: str, locator: Any = None) -> None:
        """Keep a picture, where TEST_SCREENSHOTS names a directory for them."""
        if folder := os.environ.get("TEST_SCREENSHOTS"):
            (locator or self.page).screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("jupyter")
    folders = {name: base / name for name in (
        "notebooks", "config", "data", "runtime", "ipython", "home", "workspaces", "user",
        "settings")}
    for folder in folders.values():
        folder.mkdir()
    (folders["settings"] / "overrides.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "server.log"
    environment = {
        **os.environ, "JUPYTER_CONFIG_DIR": str(folders["config"]), "HOME": str(folders["home"]),
        "JUPYTER_DATA_DIR": str(folders["data"]), "JUPYTER_RUNTIME_DIR": str(folders["runtime"]),
        "IPYTHONDIR": str(folders["ipython"]), "CLOISTER_HOME": str(base / "cloister"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folders["workspaces"]),
        "JUPYTERLAB_SETTINGS_DIR": str(folders["user"]), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with log.open("wb") as writing:
        process = subprocess.Popen([
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            "--expose-app-in-browser", "--ip=127.0.0.1", f"--port={port}", "--port-retries=0",
            f"--notebook-dir={folders['notebooks']}", f"--IdentityProvider.token={TOKEN}",
            f"--LabApp.app_settings_dir={folders['settings']}", "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.extension_manager=readonly",
        ], env=environment, stdout=writing, stderr=writing, cwd=folders["notebooks"])
    deadline = time.monotonic() + 90
    while not list(folders["runtime"].glob("jpserver-*.json")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield Server(
        f"http://127.0.0.1:{port}", folders["notebooks"], log, folders["ipython"],
        folders["settings"], process)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(**OPTIONS)
        yield running
        running.close()


@pytest.fixture
def open_notebook(server: Server, browser: Any) -> Iterator[Callable[..., Notebook]]:
    """Opens a notebook with some cells, its kernel running."""
    contexts: list[Any] = []
    asked: list[str] = []

    def ask(request: Any) -> None:
        asked.append(request.url)

    def opened(name: str, *cells: str, width: int = 1280, height: int = 1000) -> Notebook:
        path = server.write(name, *cells)
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        context.on("request", ask)
        page = context.new_page()
        received: list[int] = []

        def listen(socket: Any) -> None:
            asked.append(socket.url)
            socket.on("framereceived", lambda frame: received.append(len(frame)))

        page.on("websocket", listen)
        page.set_default_timeout(60_000)
        page.goto(f"{server.url}/lab/tree/{name}?token={TOKEN}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        page.evaluate("""() => jupyterapp.shell.currentWidget.sessionContext.ready.then(
            () => jupyterapp.shell.currentWidget.sessionContext.session.kernel.info
        ).then(() => null)""")
        return Notebook(page, path, received)

    yield opened
    for context in contexts:
        for page in context.pages:
            page.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")
        context.close()
    outside = [url for url in asked if not local(url)]
    assert not outside, f"the page asked for {outside}"


def local(url: str) -> bool:
    """Whether an address stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "about") or parts.hostname in ("127.0.0.1", "localhost")
