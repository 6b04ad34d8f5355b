"""Pictures and recordings in a real browser: dropped or chosen, asked about, and in no file."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tests.browser.conftest import Notebook, Server
from tests.browser.test_chat import said, send, violations, wait_for
from tests.conftest import make_bundle
from tests.unit.runtime.conftest import make_media_bundle
from tests.unit.runtime.served import png

pytestmark = pytest.mark.slow

Open = Callable[..., Notebook]
# The model is a fake in the kernel's own process: the shipped bundles may take text alone.
CELL = """from pathlib import Path
from tests.unit.runtime.conftest import LETTERS, FakeEngine
from tests.unit.runtime.served import Served
import cloister_jupyter.{module} as module
from cloister_jupyter import ChatWidget, PromptLab

path = Path({path!r})
module.Worker = lambda path, **_: Served(FakeEngine(path, LETTERS))
page = {page}
page"""
RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (480, 640, 3), np.uint8)
PICTURE = {"name": "private.png", "mimeType": "image/png", "buffer": png(PIXELS, Place="52.5 N")}


def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, RNG.uniform(-1, 1, 16000), 8000, format="WAV")
    return file.getvalue()


RECORDING = {"name": "private.wav", "mimeType": "audio/wav", "buffer": wav()}


@pytest.fixture
def media_path(tmp_path: Path, tokenizer_dir: Path) -> str:
    return str(make_media_bundle(tmp_path / "media.cloister", tokenizer_dir).path)


def choose(notebook: Notebook, page: Any, *files: dict[str, Any]) -> None:
    """Take files by the button, with the keyboard."""
    page.locator(".cl-badge summary:not(:has-text('asking'))").wait_for()
    notebook.page.wait_for_timeout(500)  # JupyterLab moves the focus once the cell has run
    with notebook.page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Add picture or recording").press("Enter")
    chosen.value.set_files(list(files))


def drop(page: Any, target: str, file: dict[str, Any]) -> None:
    page.locator(target).evaluate("""(target, {name, type, data}) => {
        const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
        const given = new DataTransfer();
        given.items.add(new File([bytes], name, {type}));
        for (const kind of ['dragover', 'drop']) target.dispatchEvent(new DragEvent(
            kind, {dataTransfer: given, bubbles: true, cancelable: true}));
    }""", {"name": file["name"], "type": file["mimeType"],
           "data": base64.b64encode(file["buffer"]).decode()})


def chips(page: Any) -> list[str]:
    return page.locator(".cl-attached .cl-file").evaluate_all(
        "all => all.map((each) => each.firstChild.textContent)")


def test_files_are_chosen_dropped_removed_and_asked_about_and_lie_in_no_file(
    open_notebook: Open, server: Server, media_path: str
) -> None:
    notebook = open_notebook("files.ipynb", CELL.format(
        module="talk", path=media_path, page="ChatWidget(path)"))
    notebook.run_cell(0)
    chat = notebook.lab()
    choose(notebook, chat, PICTURE, RECORDING)
    chat.locator(".cl-attached .cl-file:has-text('recording 32.0 kB')").wait_for()
    drop(chat, ".cl-compose textarea", PICTURE)
    chat.locator(".cl-attached .cl-file").nth(2).wait_for()
    assert chips(chat) == ["picture 640 x 480", "recording 32.0 kB", "picture 640 x 480"]
    drop(chat, ".cl-compose textarea", {**PICTURE, "name": "a.pdf", "mimeType": "application/pdf"})
    chat.locator(".cl-alert:has-text('neither a picture nor a recording')").wait_for()
    notebook.screenshot("files", chat)
    if "TEST_AXE" in os.environ:
        for theme in ("Light", "Dark", "Dark High Contrast"):
            notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
            notebook.page.wait_for_timeout(400)
            assert violations(notebook) == []
        notebook.command("apputils:change-theme", theme="JupyterLab Light")
    remove = chat.get_by_role("button", name="Remove picture 640 x 480").nth(1)
    remove.focus()
    notebook.page.keyboard.press("Enter")
    assert chips(chat) == ["picture 640 x 480", "recording 32.0 kB"]
    assert chat.locator(".cl-attach").evaluate("button => button === document.activeElement")

    send(chat, "what is this?")
    question = chat.locator(".cl-user")
    assert question.locator(".cl-file").all_inner_texts() == ["picture 6 x 4", "recording 2.0 s"]
    assert chips(chat) == []
    send(chat, "and now?")
    assert chat.locator(".cl-user").nth(1).locator(".cl-file").count() == 0
    chat.get_by_role("button", name="Edit").first.click()
    notebook.page.keyboard.press("Control+A")
    notebook.page.keyboard.type("and what else?")
    notebook.page.keyboard.press("Control+Enter")
    chat.locator(".cl-user:has-text('and what else?')").wait_for()
    wait_for(chat, "first after")
    assert len(said(chat)) == 2
    assert question.locator(".cl-file").count() == 2

    notebook.command("docmanager:save")
    saved = notebook.path.read_text()
    assert "takes" in json.dumps(json.loads(saved)["metadata"]["widgets"])
    forms = [form for data in (PICTURE["buffer"][2000:2060], RECORDING["buffer"][2000:2060])
             for form in (data, *(base64.b64encode(bytes(n) + data)[4:-4] for n in range(3)))]
    base = server.log.parent
    for path in filter(Path.is_file, base.rglob("*")):
        content = path.read_bytes()
        assert not any(form in content for form in (*forms, b"private.png", b"52.5 N")), path


def test_a_file_that_is_refused_is_given_back_with_the_question(
    open_notebook: Open, media_path: str
) -> None:
    notebook = open_notebook("files-refused.ipynb", CELL.format(
        module="talk", path=media_path, page="ChatWidget(path)"))
    notebook.run_cell(0)
    chat = notebook.lab()
    choose(notebook, chat, {**PICTURE, "buffer": b"%PDF-1.4"})
    chat.locator(".cl-attached .cl-file").wait_for()
    assert chips(chat) == ["picture"]
    box = chat.get_by_label("Message", exact=True)
    box.fill("what is this?")
    box.press("Enter")
    chat.locator(".cl-alert:has-text('no PNG, JPEG or WebP picture')").wait_for()
    wait_for(chat, "failed")
    assert box.input_value() == "what is this?"
    assert chips(chat) == ["picture"]
    chat.get_by_role("button", name="Remove picture").click()
    box.press("Enter")
    wait_for(chat, "first after")


def test_a_lab_asks_its_tiers_about_a_file_and_one_of_texts_refuses_by_name(
    open_notebook: Open, media_path: str, tokenizer_dir: Path
) -> None:
    make_bundle(Path(media_path).with_name("text.cloister"), tokenizer_dir)
    notebook = open_notebook("files-lab.ipynb", CELL.format(
        module="runs", path=media_path,
        page="PromptLab([], [path, path.with_name('text.cloister')])"))
    notebook.run_cell(0)
    lab = notebook.lab()
    drop(lab, ".cl-asked textarea", PICTURE)
    lab.locator(".cl-attached .cl-file").wait_for()
    lab.get_by_role("button", name="Run", exact=True).click()
    lab.locator(".cl-toolbar .cl-note:has-text('done')").wait_for()
    assert lab.locator(".cl-answer").first.inner_text()
    assert "reads text only" in lab.locator(".cl-error").nth(1).inner_text()
    assert chips(lab) == ["picture 640 x 480"]
    notebook.screenshot("files-lab", lab)
