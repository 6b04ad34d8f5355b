"""The magics in real kernels: streamed, interrupted, refused in a sentence, out of the history."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from cloister.errors import SettingError
from cloister.settings import Settings
from cloister.vault.keys import Provider
from cloister.vault.local import keyholder
from cloister.vault.store import Vault
from cloister_jupyter.magics import CloisterMagics, Status

SECRET = "the seven lighthouses of the zanzibar ferry company"


class Kernel:
    """A kernel of one's own, and what its cells showed."""

    def __init__(self, base: Path, **environment: str) -> None:
        self.base = base
        for name in ("ipython", "home"):
            (base / name).mkdir()
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env={
            **os.environ, "IPYTHONDIR": str(base / "ipython"), "CLOISTER_HOME": str(base / "home"),
            "CLOISTER_PROVIDER": "keyfile", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}, cwd=base)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(
        self, code: str, during: Callable[[str], Any] = lambda text: None,
        stdin: Callable[[], str] | None = None,
    ) -> tuple[dict[str, Any], str]:
        """Run a cell; what it replied, and its text. `during` is told what came so far."""
        text = ""

        def output(message: Any) -> None:
            nonlocal text
            content = message["content"]
            if message["msg_type"] == "stream":
                text += content["text"]
                during(text)
            elif message["msg_type"] == "error":
                text += "\n".join(content["traceback"])
            elif message["msg_type"] in ("execute_result", "display_data"):
                text += content["data"].get("text/html", content["data"]["text/plain"])

        reply = self.client.execute_interactive(
            code, timeout=90, output_hook=output, allow_stdin=stdin is not None,
            stdin_hook=lambda message: self.client.input(stdin() if stdin else ""))
        return reply["content"], text

    def worker(self) -> psutil.Process:
        (found,) = [child for child in psutil.Process(self.manager.provisioner.pid).children()
                    if "cloister.runtime.worker" in child.cmdline()]
        return found

    def history(self) -> list[str]:
        """What IPython's database has, once the kernel is gone."""
        self.client.stop_channels()
        self.manager.shutdown_kernel()
        path, = self.base.glob("ipython/profile_default/history.sqlite")
        with sqlite3.connect(path) as db:
            rows = db.execute("SELECT source, source_raw FROM history").fetchall()
        for file in path.parent.glob("history.sqlite*"):
            assert SECRET.encode() not in file.read_bytes()
        return [text for row in rows for text in row]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    assert made.run("%load_ext cloister_jupyter")[0]["status"] == "ok"
    yield made
    if made.manager.has_kernel:
        made.client.stop_channels()
        made.manager.shutdown_kernel(now=True)


def test_a_cell_is_answered_under_it_by_a_process_that_stays_warm_and_leaves_no_history(
    kernel: Kernel
) -> None:
    reply, text = kernel.run("%%cloister --tier nano-1 --system call\nwake me up at eight")
    assert reply["status"] == "ok"
    answer, figures = text.rsplit("\n", 1)
    assert json.loads(answer)["name"] and "nano-1 · ended by itself" in figures
    worker = kernel.worker()
    kernel.run(f"%%cloister --system redact --max-tokens 8\n{SECRET}")
    kernel.run(f"%%capture said\n%%cloister --max-tokens 8\n{SECRET}")
    kernel.run(f"get_ipython().run_cell_magic('cloister', '--max-tokens 8', {SECRET!r})")
    kernel.run("%alias_magic --cell ask cloister")
    kernel.run(f"%%ask --max-tokens 8\n{SECRET}")
    assert kernel.worker() == worker
    reply, text = kernel.run("%cloister_status")
    for words in ("nano-1", f"process {worker.pid}", "guard tier", "a line in place of each",
                  "holds the source and the output", "<table>"):
        assert words in text
    assert SECRET not in text
    reply, text = kernel.run("In[-3:-1], _i, 'torch' in __import__('sys').modules")
    assert SECRET not in text and "not kept here" in text and "False" in text
    kernel.run("marker = 'this is kept'\n%unload_ext cloister_jupyter")
    assert not [child for child in psutil.Process(kernel.manager.provisioner.pid).children()
                if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
                and "cloister.runtime.worker" in child.cmdline()]
    history = kernel.history()
    assert any("this is kept" in line for line in history)
    assert sum(line.startswith("# a cell of %%cloister") for line in history) == 2 * 5


def test_an_interrupted_cell_keeps_what_came_and_its_process_rests(kernel: Kernel) -> None:
    asked = "%%cloister --system story --temperature 9 --seed 1 --max-tokens 900"
    kernel.run("%%cloister --system story --max-tokens 2\nonce")  # it is warm
    interrupted: list[float] = []

    def interrupt(text: str) -> None:
        if len(text) > 40 and not interrupted:
            interrupted.append(time.monotonic())
            kernel.manager.interrupt_kernel()

    reply, text = kernel.run(f"{asked}\nonce upon a time", interrupt)
    took_ms = 1000 * (time.monotonic() - interrupted[0])
    print(f"interrupted after {took_ms:.0f} ms, {len(text)} characters kept")
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    partial, sentence = text.rsplit("\n", 1)
    assert len(partial) > 40
    assert sentence == "KeyboardInterrupt: Interrupted; what was answered by then stays above."
    worker = kernel.worker()
    before = sum(worker.cpu_times()[:2])
    time.sleep(1)
    assert sum(worker.cpu_times()[:2]) - before < 0.1
    assert took_ms < 2000
    _, whole = kernel.run(f"{asked}\nonce upon a time")
    assert kernel.worker() == worker
    assert whole.startswith(partial.rstrip("\n"))


def test_a_session_goes_on_from_cell_to_cell_and_its_texts_are_found_in_the_notebook(
    kernel: Kernel, tmp_path: Path
) -> None:
    for text in (SECRET, "and where do they stand"):
        reply, _ = kernel.run(f"%%cloister --session trip --system redact\n{text}")
        assert reply["status"] == "ok"
    kernel.run("%%cloister\nplay the best of nineteen seventy nine for me")
    _, status = kernel.run("%cloister_status")
    assert "keyfile" in status and "(vault)" in status
    notebook = tmp_path / "n.ipynb"
    notebook.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
        {"cell_type": "code", "metadata": {}, "outputs": [], "source": source} for source in (
            SECRET, "play the best of nineteen seventy nine for me", "nothing of the kind")]}))
    command = [sys.executable, "-m", "cloister.cli"]
    environment = {**os.environ, "CLOISTER_HOME": str(tmp_path / "home"),
                   "CLOISTER_PROVIDER": "keyfile"}
    found = subprocess.run(
        [*command, "lab", "check", str(notebook), "--json"], env=environment,
        capture_output=True, text=True, check=False)
    cells = {each["cell"] for each in json.loads(found.stdout)["findings"]}
    assert cells == {1, 2}
    kernel.history()


def test_a_notebook_that_is_executed_holds_the_answer_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    cells = ["%load_ext cloister_jupyter", f"%%cloister --system call --max-tokens 8\n{SECRET}",
             f"%%cloister --tier nano-9\n{SECRET}"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    with pytest.raises(CellExecutionError, match="SettingError: There is no such tier"):
        NotebookClient(notebook, timeout=90).execute(cwd=str(tmp_path))
    answer, refused = notebook.cells[1].outputs, notebook.cells[2].outputs
    assert [each.output_type for each in answer] == ["stream", "display_data"]
    assert len(answer[0].text) > 8
    assert refused[0].traceback == [
        "SettingError: There is no such tier; tiers are ultra, pro, nano-2, nano-1."]
    # nbclient gives its kernels a history in memory, so nbconvert leaves none.
    assert not [path for path in tmp_path.rglob("*")
                if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_the_passphrase_of_a_vault_is_asked_for_in_the_cell_until_it_is_right(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.run("import os; del os.environ['CLOISTER_PROVIDER']")
    settings = Settings(home=tmp_path / "home", data=None)
    words = "a sesame that opens by night"
    Vault.create(settings.vault, keyholder(settings, lambda: words), Provider.PASSPHRASE).close()
    cell = f"%%cloister --session trip --max-tokens 4\n{SECRET}"
    assert "set CLOISTER_PASSPHRASE." in kernel.run(cell)[1]
    reply, text = kernel.run(cell, stdin=lambda: "wrong")
    assert reply["ename"] == "WrongPassphrase" and text.startswith("WrongPassphrase: ")
    assert kernel.run(cell, stdin=lambda: words)[0]["status"] == "ok"
    assert kernel.run(cell)[0]["status"] == "ok"
    assert not [line for line in kernel.history() if words in line]


@pytest.mark.parametrize(("line", "text", "sentence"), [
    ("--teir nano-1", "a", "an option that there is not; `%%cloister?` shows them all."),
    ("--temp 1", "a", "an option that there is not; `%%cloister?` shows them all."),
    ("zanzibar", "a", "an option that there is not; `%%cloister?` shows them all."),
    ("--max-tokens many", "a", "The option --max-tokens of %%cloister has no value that it can"),
    ("--seed", "a", "The option --seed of %%cloister has no value that it can have"),
    ("--max-tokens 0", "a", "max_tokens is 0; it must be at least 1."),
    ("--temperature -1", "a", "temperature is -1.0; it must be a number of at least 0."),
    ("--top-p nan", "a", "top_p is nan"),
    ("--system 'open", "a", "A quote in the line of %%cloister is not closed"),
    ("--tier nano-1 --bundle b", "a", "by --tier or --bundle; leave one of them out."),
    ("--tier zanzibar", "a", "There is no such tier; tiers are ultra, pro, nano-2, nano-1."),
    ("", "\n", "There is no prompt"),
    ("", "x" * 100_000, "The prompt has 100,000 bytes"),
    ("--fill", "the {zanzibar} ferry", "no text or number called zanzibar"),
    ("--fill", "the {shell} ferry", "no text or number called shell"),
    ("--fill", '{"a": 1}', "A brace in line 1"),
])
def test_a_line_that_cannot_be_read_is_refused_in_a_sentence(
    magics: CloisterMagics, line: str, text: str, sentence: str
) -> None:
    with pytest.raises(Exception, match=r"\.$") as caught:
        magics.cloister(line, text)
    assert sentence in str(caught.value)
    (shown,) = caught.value._render_traceback_()  # type: ignore[attr-defined]
    assert shown == f"{type(caught.value).__name__}: {caught.value}"
    assert "\n" not in shown and caught.value.__suppress_context__


@pytest.fixture
def magics(tmp_path: Path) -> Iterator[CloisterMagics]:
    shell = InteractiveShell(
        config=Config({"HistoryManager": {"enabled": False}}), ipython_dir=str(tmp_path))
    shell.user_ns.update(city="Denver", seats=4, shell=shell)
    made = CloisterMagics(shell)
    yield made
    made.close()


def test_an_interrupt_as_a_cell_ends_is_one_sentence_and_its_processes_end_in_time(
    magics: CloisterMagics, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun = magics._idle.begin, list[str]()

    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        begin()
        begun.append("the wait")

    monkeypatch.setattr(magics._idle, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        magics.cloister("--tier zanzibar", "a")
    (shown,) = caught.value._render_traceback_()  # type: ignore[attr-defined]
    assert shown.startswith("KeyboardInterrupt: Interrupted; ") and begun


def test_variables_are_filled_in_only_where_that_is_asked_for(magics: CloisterMagics) -> None:
    text = 'a table for {seats} in {city}, as {{"json": 1}}'
    assert magics._read("", text)[0].prompt == text
    assert magics._read("--fill", text)[0].prompt == 'a table for 4 in Denver, as {"json": 1}'
    with pytest.raises(SettingError):
        magics._read("--fill", "{shell.user_ns}")


def test_help_shows_the_options_and_what_is_kept() -> None:
    words = CloisterMagics.cloister.__doc__ or ""
    for part in ("--tier", "--session", "--fill", "The notebook file keeps the cell"):
        assert part in words


def test_a_status_is_text_and_tables_that_escape_what_they_hold() -> None:
    status = Status((("Group", (("<name>", "a & b"),)),))
    assert repr(status) == "Group\n  <name>: a & b"
    assert "&lt;name&gt;" in status._repr_html_() and "a &amp; b" in status._repr_html_()
