"""The chat in a real browser: asked, stopped, gone back in, sealed, and nothing of it in files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import TimeoutError as TimedOut
from tests.browser.conftest import Notebook, Server
from tests.browser.test_lab import HOSTILE, MOST_MS, models, worker_seconds

from cloister import family
from cloister.audit.canary import Canary, search
from cloister.bundle import Bundle
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Open = Callable[..., Notebook]
CHAT = """from cloister_jupyter import ChatWidget

chat = ChatWidget("nano-1", session={session!r}, system={system!r})
chat"""


def opened(open_notebook: Open, name: str, *cells: str, **options: Any) -> tuple[Notebook, Any]:
    """Open a notebook with a chat in its first cell, which was run."""
    cell = CHAT.format(**{"session": None, "system": "call", **options})
    notebook = open_notebook(f"{name}.ipynb", cell, *cells)
    notebook.run_cell(0)
    return notebook, notebook.lab()


def long_answers(chat: Any) -> None:
    chat.locator(".cl-sampling summary").click()
    chat.get_by_label("Temperature").fill("9")
    chat.get_by_label("Seed").fill("2")
    chat.get_by_label("Tokens at most").fill("900")


def wait_for(chat: Any, words: str) -> None:
    chat.locator(f".cl-toolbar > .cl-note:has-text('{words}')").wait_for(timeout=60_000)


def said(chat: Any) -> list[str]:
    return [text.strip() for text in chat.locator(".cl-said").all_inner_texts()]


def send(chat: Any, text: str, end: str = "first after") -> None:
    box = chat.get_by_label("Message", exact=True)
    box.fill(text)
    box.press("Enter")
    chat.locator(f".cl-user:has-text('{text}')").wait_for()
    wait_for(chat, end)


def violations(notebook: Notebook) -> list[str]:
    notebook.page.evaluate(Path(os.environ["TEST_AXE"]).read_text())
    result = notebook.page.evaluate("() => axe.run('.cloister-chat')")
    return [f"{each['id']}: {node['html']} {node['failureSummary']}"
            for each in result["violations"] if each["impact"] in ("serious", "critical")
            for node in each["nodes"]]


def test_a_conversation_goes_by_keyboard_and_is_clean_in_each_theme(open_notebook: Open) -> None:
    notebook, chat = opened(open_notebook, "chat")
    keyboard, page = notebook.page.keyboard, notebook.page
    chat.get_by_label("Message", exact=True).focus()
    keyboard.type("wake me up at eight")
    keyboard.press("Enter")
    wait_for(chat, "ended by itself")
    assert chat.locator(".cl-assistant .cl-call pre").inner_text().startswith("{")
    assert "tokens/s" in chat.locator(".cl-toolbar > .cl-note").inner_text()
    used = chat.locator(".cl-used").inner_text()
    assert used.endswith("tokens") and " of " in used
    assert chat.get_by_label("Message", exact=True).input_value() == ""
    send(chat, "play some jazz")
    first = said(chat)
    assert len(first) == 5 and page.locator(".jp-Cell").count() == 1

    again = chat.get_by_role("button", name="Regenerate")
    assert again.count() == 1  # of the last answer only
    again.focus()
    keyboard.press("Enter")
    wait_for(chat, "the same answer")
    assert said(chat) == first
    edit = chat.get_by_role("button", name="Edit").first
    edit.focus()
    keyboard.press("Enter")
    keyboard.press("Escape")  # as it was
    assert said(chat) == first
    assert edit.evaluate("button => button === document.activeElement")
    keyboard.press("Enter")
    assert chat.get_by_role("button", name="Send, and drop what follows").is_visible()
    notebook.screenshot("chat-editing", chat)
    keyboard.press("Control+A")
    keyboard.type("book a table for two in Denver")
    keyboard.press("Control+Enter")
    wait_for(chat, "ended by itself")
    assert said(chat)[1] == "book a table for two in Denver" and len(said(chat)) == 3
    chat.locator(".cl-badge summary").click()
    chat.get_by_role("button", name="Try to reach out").click()
    wait_for(chat, "tried")
    chat.locator(".cl-badge summary:has-text('tried to reach out, refused')").wait_for()
    chat.locator(".cl-sampling summary").click()
    chat.get_by_role("button", name="Forget this conversation").click()
    if "TEST_AXE" in os.environ:
        for theme in ("Light", "Dark", "Dark High Contrast"):
            notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
            for name, width in (("wide", 1280), ("narrow", 640)):
                page.set_viewport_size({"width": width, "height": 1100})
                page.wait_for_timeout(400)
                notebook.screenshot(f"chat-{theme.lower().replace(' ', '-')}-{name}")
                assert violations(notebook) == []
        notebook.command("apputils:change-theme", theme="JupyterLab Light")
    assert chat.get_by_role("button", name="Forget", exact=True).evaluate(
        "button => button === document.activeElement")
    keyboard.press("Escape")
    assert len(said(chat)) == 3
    chat.get_by_role("button", name="Forget this conversation").press("Enter")
    keyboard.press("Enter")
    wait_for(chat, "forgotten")
    assert said(chat) == ["call"]


def stop_at_first_word(chat: Any, way: str) -> None:
    """Stop as soon as an answer begins, and note in the page how long its end took."""
    chat.evaluate("""(root, way) => {
        const note = root.querySelector('.cl-toolbar > .cl-note');
        let began = 0;
        new MutationObserver((_, observer) => {
            if (!began && note.textContent.startsWith('answers')) {
                began = performance.now();
                if (way === 'button') root.querySelector('.cl-stop').click();
                else root.querySelector('.cl-compose textarea').dispatchEvent(
                    new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
            } else if (began && note.textContent.startsWith('stopped,')) {
                root.dataset.stoppedMs = performance.now() - began;
                observer.disconnect();
            }
        }).observe(root, {subtree: true, childList: true, characterData: true});
    }""", way)


def test_stop_works_beside_a_busy_cell_and_a_process_that_dies_is_not_the_end(
    open_notebook: Open, server: Server
) -> None:
    busy = "import time\nend = time.time() + 60\nwhile time.time() < end:\n    pass"
    notebook, chat = opened(open_notebook, "chat-stop", busy, system="story")
    long_answers(chat)
    send(chat, "once upon a time", "cut at")
    for way, cell in (("button", None), ("Escape", None), ("button", 1)):
        if cell is not None:
            notebook.run_cell(cell, wait=False)
            notebook.page.locator(".jp-Cell").nth(cell).locator(":scope:has-text('[*]')").wait_for()
        for _ in range(3):  # on a busy machine an answer may have ended before the stop is heard
            chat.evaluate("root => { delete root.dataset.stoppedMs; }")
            stop_at_first_word(chat, way)
            chat.get_by_role("button", name="Regenerate").click()
            with contextlib.suppress(TimedOut):
                notebook.page.wait_for_function(
                    "() => document.querySelector('.cloister-chat').dataset.stoppedMs",
                    timeout=15_000)
                break
        took_ms = float(chat.get_attribute("data-stopped-ms"))
        print(f"stopped after {took_ms:.0f} ms by {way}{' beside a busy cell' if cell else ''}")
        assert took_ms < MOST_MS * (2 if cell else 1)
    assert "[*]" in notebook.page.locator(".jp-Cell").nth(1).inner_text()
    notebook.kernel("kernel.interrupt()")
    before = worker_seconds(server)
    time.sleep(1)
    assert worker_seconds(server) - before < 0.1
    model = models(server)[-1]
    chat.get_by_role("button", name="Regenerate").click()
    wait_for(chat, "answers")
    model.kill()
    chat.locator(".cl-alert:has-text('ended without an answer')").wait_for()
    wait_for(chat, "failed")
    chat.get_by_role("button", name="Regenerate").click()
    wait_for(chat, "cut at")
    chat.get_by_label("Message", exact=True).fill("x" * 100_000)
    chat.get_by_role("button", name="Send").click()
    chat.locator(".cl-alert:has-text('100,000 bytes and the lab takes 65,536')").wait_for()
    chat.get_by_label("Message", exact=True).fill("lazy " * 2500)
    chat.get_by_role("button", name="Send").click()
    chat.locator(".cl-alert:has-text('context holds')").wait_for()
    assert chat.get_by_label("Message", exact=True).input_value().startswith("lazy")  # given back
    assert len(said(chat)) == 3


def test_a_sealed_conversation_leaves_no_trace_and_outlives_its_kernel(
    open_notebook: Open, server: Server
) -> None:
    """What is typed into a cell is found in each place, what is typed into the chat in none."""
    typed, control = Canary.new("chat"), Canary.new("cell")
    notebook, chat = opened(
        open_notebook, "chat-sealed", f"import os\nword = {control.text!r}\n"
        "os.write(2, word.encode())\nprint(word)", "chat", "chat.close()\n" + CHAT.format(
            session="trip", system=None), session="trip", system="redact")
    send(chat, typed.text)
    answer = Canary("answer", said(chat)[2])
    assert len(answer.text) > 12
    assert "sealed in the vault" in chat.locator(".cl-badge summary").inner_text()
    notebook.run_cell(1)
    notebook.run_cell(2)  # another view of the same chat
    other = notebook.lab(1)
    other.locator(".cl-assistant").wait_for()
    send(other, "hello there")
    chat.locator(".cl-user:has-text('hello there')").wait_for()
    wait_for(chat, "first after")
    words = said(chat)
    assert said(other) == words
    notebook.command("docmanager:save")
    notebook.command("docmanager:save")
    notebook.kernel("kernel.restart()")
    chat.locator(".cl-alert:has-text('detached')").wait_for()
    assert chat.get_by_role("button", name="Send").is_disabled()
    assert said(chat) == words
    notebook.screenshot("chat-detached", chat)
    notebook.run_cell(0)
    fresh = notebook.page.locator(".cloister-chat:not(.cl-detached)")
    fresh.locator(".cl-assistant").nth(1).wait_for()
    assert said(fresh) == words
    send(fresh, "and goodbye")
    notebook.kernel("kernel.shutdown()")
    bundle = Bundle.open(family.bundle_path("nano-1"))
    model = Tokenizer.from_files(bundle.tokenizer_path, bundle.template_path)
    places = ("chat-sealed.ipynb", "chat-sealed-checkpoint.ipynb", "history.sqlite", "server.log")
    deadline = time.monotonic() + 20
    while True:
        found = {find.file.name for find in search(server.log.parent, [control], model)}
        if set(places) <= found or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert set(places) <= found
    traces = search(server.log.parent, [typed, answer], model)
    print(f"{len(traces)} traces")
    assert traces == []
    assert "nano-1" in json.dumps(json.loads(notebook.path.read_text())["metadata"]["widgets"])


def test_a_question_before_the_page_was_told_what_there_is_goes_behind_it(
    open_notebook: Open
) -> None:
    deaf = ("\n".join(CHAT.format(session=None, system="call").splitlines()[:-1])
            + """
receive, opened = chat.receive, []

def late(content):
    if content["type"] != "open" or opened:
        receive(content)
    else:
        opened.append(content)

chat.receive = late
chat""")
    notebook = open_notebook("chat-early.ipynb", deaf)
    notebook.run_cell(0)
    chat = notebook.lab()
    send(chat, "wake me up at eight")
    roles = chat.locator(".cl-message").evaluate_all("all => all.map((each) => each.className)")
    assert [each.split("cl-")[-1] for each in roles] == ["system", "user", "assistant"]


def test_two_chats_of_one_session_and_an_answer_that_is_no_markup(open_notebook: Open) -> None:
    second = CHAT.replace("chat = ", "other = ").replace("\nchat", "\nother").format(
        session="both", system="call")
    hostile = {
        "type": "snapshot", "seq": 900, "turn": None, "over": "", "text": "", "media": [],
        "after": 0, "answer": "", "used": 1, "context": 2, "notice": None, "messages": [
            {"role": "user", "text": "p", "media": [], "calls": []},
            {"role": "assistant", "media": [], "calls": [],
             "text": f"{HOSTILE}\n```py\nx = 1\n```\n[a](b)"}]}
    notebook, chat = opened(
        open_notebook, "chat-two", second, f"chat.send({hostile!r})", session="both")
    notebook.run_cell(1)
    other = notebook.lab(1)
    send(chat, "wake me up at eight")
    other.get_by_label("Message", exact=True).fill("play some jazz")
    other.get_by_label("Message", exact=True).press("Enter")
    other.locator(".cl-alert:has-text('Another process')").wait_for()
    assert other.get_by_label("Message", exact=True).input_value() == "play some jazz"
    other.get_by_role("button", name="Take up what is kept").click()
    wait_for(other, "taken up")
    assert said(other) == said(chat)
    other.get_by_label("Message", exact=True).press("Enter")
    wait_for(other, "ended by itself")
    notebook.screenshot("chat-two")
    notebook.run_cell(2)
    answer = chat.locator(".cl-said").nth(1)
    answer.locator("pre:has-text('x = 1')").wait_for()
    assert set(answer.locator("*").evaluate_all("all => all.map((each) => each.tagName)")) == {
        "SPAN", "PRE"}
    text = answer.inner_text()
    assert "<script>" in text and "\u241b[31m" in text and "\u27e8U+202E\u27e9" in text
    assert "hacked" not in notebook.page.title()
