"""The lab in a real browser: typed, run, stopped, and nothing of it left on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.browser.conftest import LAB, Notebook, Server

from cloister import family
from cloister.audit.canary import Canary, search
from cloister.bundle import Bundle
from cloister.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

MOST_MS = 1000  # from the click to the end; 51 to 67 where little else runs (goal 200)
Open = Callable[..., Notebook]


def field(lab: Any, label: str) -> Any:
    """Find a field of the first tab; others have like ones."""
    return lab.get_by_role("tabpanel").first.get_by_label(label, exact=True)


def choose(lab: Any, *, task: str = "call", prompt: str = "wake me up at eight") -> None:
    field(lab, "Prompt").fill(prompt)
    field(lab, "Task").select_option(task)


def column(lab: Any, name: str) -> Any:
    return lab.locator(".cl-column", has=lab.page.locator(f"h3:text-is('{name}')"))


def wait_for_end(lab: Any, words: str = "done") -> None:
    lab.locator(f".cl-toolbar > .cl-note:text-is('{words}')").wait_for(timeout=120_000)


def test_four_tiers_stream_into_a_column_each_and_end_with_figures(open_notebook: Open) -> None:
    notebook = open_notebook("flow.ipynb", "from cloister_jupyter import PromptLab\nPromptLab()")
    notebook.run_cell(0)
    lab = notebook.lab()
    assert lab.get_by_role("button", name="Run").is_enabled()
    assert lab.get_by_role("button", name="Stop").is_visible()
    lab.locator(".cl-badge summary:has-text('not known')").wait_for()
    choose(lab, prompt="book a table for four at an italian restaurant in Denver")
    field(lab, "Prompt").press("Control+Enter")
    wait_for_end(lab)
    notebook.screenshot("four-tiers", lab)
    for name in ("ultra", "pro", "nano-2", "nano-1"):
        answered = column(lab, name)
        assert "{" in answered.locator(".cl-answer").inner_text()
        figures = answered.locator(".cl-figures").inner_text()
        for part in ("first token", "tokens/s", "peak memory", "bundle", "cold"):
            assert part in figures
    assert "guard tier" in lab.locator(".cl-badge summary").inner_text()
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    assert "warm" in column(lab, "nano-1").locator(".cl-figures").inner_text()


def test_a_bundle_that_is_missing_and_a_process_that_dies_leave_the_others_going(
    open_notebook: Open, server: Server
) -> None:
    notebook = open_notebook(
        "errors.ipynb", "from cloister_jupyter import PromptLab\n"
        "PromptLab(['nano-2', 'nano-1'], bundles=['gone.cloister'])")
    notebook.run_cell(0)
    lab = notebook.lab()
    choose(lab)
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    gone = column(lab, "gone")
    assert gone.locator(".cl-state").inner_text() == "error"
    assert gone.locator(".cl-error").inner_text().endswith(".")
    long_answers(lab)
    lab.get_by_role("button", name="Run").click()
    column(lab, "nano-2").locator(".cl-state:has-text('answers')").wait_for()
    models(server)[0].kill()
    wait_for_end(lab)
    died = column(lab, "nano-2").locator(".cl-error")
    assert died.is_visible() and "ended without an answer" in died.inner_text()
    assert "cut at" in column(lab, "nano-1").inner_text()
    notebook.screenshot("errors", lab)


def models(server: Server) -> list[psutil.Process]:
    """The models' processes, in the order in which they were started."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "cloister.runtime.worker" in child.cmdline():
                found.append(child)
    return sorted(found, key=lambda child: child.create_time())


def stop_when(lab: Any, name: str) -> None:
    """Click Stop as soon as a column answers, and note in the page how long the end took."""
    lab.evaluate("""(root, name) => {
        const column = [...root.querySelectorAll('.cl-column')].find(
            (each) => each.querySelector('h3').textContent === name);
        const note = root.querySelector('.cl-toolbar > .cl-note');
        let began = 0;
        new MutationObserver((_, observer) => {
            if (!began && column.querySelector('.cl-answer').textContent) {
                began = performance.now();
                root.querySelector('.cl-stop').click();
            } else if (began && note.textContent === 'stopped') {
                root.dataset.stoppedMs = performance.now() - began;
                observer.disconnect();
            }
        }).observe(root, {subtree: true, childList: true, characterData: true});
    }""", name)


def answered(open_notebook: Open, name: str) -> tuple[Notebook, Any]:
    """Open a notebook whose lab has asked, and been answered."""
    notebook = open_notebook(name, LAB)
    notebook.run_cell(0)
    lab = notebook.lab()
    choose(lab)
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    return notebook, lab


def stopped_ms(lab: Any) -> float:
    wait_for_end(lab, "stopped")
    return float(lab.get_attribute("data-stopped-ms"))


def worker_seconds(server: Server) -> float:
    """Processor time that the models' processes have taken."""
    return sum(sum(child.cpu_times()[:2]) for child in models(server))


def long_answers(lab: Any) -> None:
    """Ask for answers that only their length ends."""
    choose(lab, task="story", prompt="once upon a time there was a king")
    lab.locator(".cl-sampling summary").click()
    field(lab, "Temperature").fill("9")
    field(lab, "Seed").fill("19")  # no tier ends by chance
    field(lab, "Tokens at most").fill("900")


def test_stop_ends_the_second_column_at_once_and_the_processor_rests(
    open_notebook: Open, server: Server
) -> None:
    notebook = open_notebook("stop.ipynb", LAB)
    notebook.run_cell(0)
    lab = notebook.lab()
    long_answers(lab)
    stop_when(lab, "nano-1")
    lab.get_by_role("button", name="Run").click()
    took_ms = stopped_ms(lab)
    print(f"stopped after {took_ms:.0f} ms")
    assert "cut at" in column(lab, "nano-2").inner_text()
    assert "stopped" in column(lab, "nano-1").inner_text()
    before = worker_seconds(server)
    time.sleep(1)
    assert worker_seconds(server) - before < 0.1
    assert took_ms < MOST_MS
    notebook.page.evaluate("""() => {
        window.longTasks = [];
        new PerformanceObserver((list) => window.longTasks.push(
            ...list.getEntries().map((entry) => entry.duration))).observe({type: 'longtask'});
    }""")
    notebook.received.clear()
    began = time.monotonic()
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    tokens, took_s = 2 * 900, time.monotonic() - began
    assert column(lab, "nano-1").locator("dd:has-text('900 after')").count() == 1
    size, count = sum(notebook.received), len(notebook.received)
    print(f"{size / tokens:.1f} kB in {count} messages for 1,000 tokens in {took_s:.1f} s; "
          f"long tasks: {notebook.page.evaluate('() => window.longTasks')} ms")
    assert count < took_s / 0.04 + 30  # a batch every 40 ms, and what begins and ends a column
    assert size < 20 * tokens + 1000 * count  # no text travels twice


def test_a_page_that_is_loaded_anew_shows_the_run_again(open_notebook: Open) -> None:
    notebook, lab = answered(open_notebook, "reload.ipynb")
    answer = column(lab, "nano-1").locator(".cl-answer").inner_text()
    notebook.command("docmanager:save")
    notebook.page.reload()
    lab = notebook.lab()
    wait_for_end(lab)
    assert column(lab, "nano-1").locator(".cl-answer").inner_text() == answer
    assert field(lab, "Prompt").input_value() == "wake me up at eight"
    lab.get_by_role("button", name="Run").click()
    column(lab, "nano-1").locator("dd:text-is('warm')").wait_for()


@pytest.mark.parametrize("way", ["control channel", "subshells"])
def test_run_and_stop_work_while_a_cell_is_busy(open_notebook: Open, way: str) -> None:
    busy = "import time\nend = time.time() + 10\nwhile time.time() < end:\n    pass"
    as_elsewhere = "\nlab.control = False" * (way == "subshells") + "\nlab"
    notebook = open_notebook(f"busy-{way.split()[0]}.ipynb", LAB + as_elsewhere, busy)
    if way == "control channel":  # as with ipykernel 6, which has no subshells
        notebook.page.evaluate(
            "() => { jupyterapp.serviceManager.kernels.commsOverSubshells = 'disabled'; }")
    notebook.run_cell(0)
    lab = notebook.lab()
    choose(lab)
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    long_answers(lab)
    notebook.run_cell(1, wait=False)
    cell = notebook.page.locator(".jp-Cell").nth(1)
    cell.locator(":scope:has-text('[*]')").wait_for()
    stop_when(lab, "nano-2")
    lab.get_by_role("button", name="Run").click()
    took_ms = stopped_ms(lab)
    print(f"stopped after {took_ms:.0f} ms beside a busy cell, by {way}")
    assert "[*]" in cell.inner_text()
    # Before it answered, or at its beginning, where the first one had ended at that moment.
    assert "stopped" in column(lab, "nano-1").inner_text()
    assert took_ms < 2 * MOST_MS  # Python's threads take turns of 5 ms with the cell's


def test_nothing_of_what_was_said_is_left_on_the_disk(open_notebook: Open, server: Server) -> None:
    """What is typed into a cell is found in each place, what is typed into the lab in none."""
    typed, control = Canary.new("lab"), Canary.new("cell")
    notebook = open_notebook(
        "canary.ipynb", LAB, f"import os\nword = {control.text!r}\n"
        "os.write(2, word.encode())\nprint(word)")
    notebook.run_cell(0)
    lab = notebook.lab()
    choose(lab, task="redact", prompt=typed.text)
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    answers = [Canary("answer", column(lab, name).locator(".cl-answer").inner_text())
               for name in ("nano-2", "nano-1")]
    assert all(len(answer.text) > 12 for answer in answers)
    # A browser keeps in its profile what stands in other fields, lists of kept names included.
    assert lab.locator("input, textarea, select").evaluate_all(
        "all => all.length > 30"
        " && all.every(each => each.autocomplete === 'off' && !each.spellcheck)")
    notebook.run_cell(1)
    notebook.command("docmanager:save")
    notebook.command("docmanager:save")
    notebook.kernel("kernel.shutdown()")  # IPython writes its history at the latest here
    base = server.log.parent
    tokenizer = Bundle.open(family.bundle_path("nano-1"))
    model = Tokenizer.from_files(tokenizer.tokenizer_path, tokenizer.template_path)
    places = ("canary.ipynb", "canary-checkpoint.ipynb", "history.sqlite", "server.log")
    deadline = time.monotonic() + 20
    while True:
        found = {find.file.name for find in search(base, [control], model)}
        if set(places) <= found or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert set(places) <= found
    assert search(base, [typed, *answers], model) == []
    state = json.loads(notebook.path.read_text())["metadata"]["widgets"]
    assert "nano-2" in json.dumps(state)  # the widget's state was kept, with no word of it


def test_two_labs_of_a_notebook_take_turns_and_do_not_mix(open_notebook: Open) -> None:
    second = "other = PromptLab(['nano-1'])\nother"
    notebook = open_notebook("two.ipynb", LAB, second)
    notebook.run_cell(0)
    notebook.run_cell(1)
    first, other = notebook.lab(0), notebook.lab(1)
    long_answers(first)
    choose(other)
    first.get_by_role("button", name="Run").click()
    other.get_by_role("button", name="Run").click()
    wait_for_end(other)
    assert "ended by itself" in column(other, "nano-1").inner_text()
    wait_for_end(first)
    assert "cut at" in column(first, "nano-1").inner_text()


@pytest.mark.parametrize("end", ["restart", "shutdown"])
def test_a_lab_whose_kernel_is_gone_says_that_it_is_detached(
    open_notebook: Open, end: str
) -> None:
    notebook = open_notebook(f"{end}.ipynb", LAB)
    notebook.run_cell(0)
    lab = notebook.lab()
    choose(lab)
    lab.get_by_role("button", name="Run").click()
    wait_for_end(lab)
    notebook.kernel(f"kernel.{end}()")
    lab.locator(".cl-alert:has-text('detached')").wait_for()
    assert lab.get_by_role("button", name="Run").is_disabled()
    assert "{" in column(lab, "nano-1").locator(".cl-answer").inner_text()
    notebook.screenshot("detached")
    if end == "shutdown":
        return
    notebook.run_cell(0)
    fresh = notebook.page.locator(".cloister-lab:not(.cl-detached)")
    fresh.wait_for()
    choose(fresh)
    fresh.get_by_role("button", name="Run").click()
    wait_for_end(fresh)


HOSTILE = (
    "<img src=x onerror=\"document.title='hacked'\"> ![a](https://example.com/a.png) "
    "<script>document.title='hacked'</script> \x1b[31m red \u202e reversed \u05e9\u05dc\u05d5\u05dd"
)


def test_an_answer_is_text_whatever_it_holds_and_a_long_prompt_is_refused(
    open_notebook: Open
) -> None:
    snapshot = {
        "type": "snapshot",
        "request": {"run": "r", "columns": ["0", "1"], "prompt": "p", "system": None},
        "events": [{"type": "delta", "run": "r", "seq": 0, "column": "0", "texts": [HOSTILE]},
                   {"type": "over", "run": "r", "seq": 1, "stopped": True}]}
    notebook = open_notebook("text.ipynb", LAB, f"lab.send({snapshot!r})")
    notebook.run_cell(0)
    lab = notebook.lab()
    notebook.run_cell(1)
    answer = column(lab, "nano-2").locator(".cl-answer")
    answer.locator(":scope:has-text('<img')").wait_for()
    assert answer.locator("*").count() == 0
    text = answer.inner_text()
    assert "<script>" in text and "\u241b[31m" in text and "\u27e8U+202E\u27e9" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "hacked" not in notebook.page.title()
    field(lab, "Prompt").fill("x" * 100_000)
    lab.get_by_role("button", name="Run").click()
    lab.locator(".cl-alert:has-text('100,000 bytes and the lab takes 65,536')").wait_for()


ENDED: dict[str, Any] = {
    "type": "ended", "run": "r", "finish": "end", "prompt_tokens": 1, "tokens": 1, "ttft_s": 0.01,
    "tokens_per_s": None, "peak_rss_bytes": 1, "bundle_bytes": 1}


PARTINGS = (
    ("on Monday \U0001f600 noon", "on Monday \U0001f601 noon", ["\U0001f600", "\U0001f601"]),
    ("four seats", "four", [" seats", "\u23f9"]),  # the end is where they part
    ("<b>one</b> two", "<i>one</i> two", ["b>one</b>", "i>one</i>"]),
    ("the same", "the same", []),
)


def answers(higher: str, lower: str) -> dict[str, Any]:
    """What the lab is sent of two answers."""
    events: list[dict[str, Any]] = []
    for id_, text in (("0", higher), ("1", lower)):
        events += [
            {"type": "delta", "run": "r", "seq": len(events), "column": id_, "texts": [text]},
            {**ENDED, "seq": len(events) + 1, "column": id_}]
    return {"type": "snapshot", "events": events, "request": {
        "run": "r", "columns": ["0", "1"], "prompt": "p", "system": None}}


def test_the_word_where_answers_part_is_marked_in_both(open_notebook: Open) -> None:
    notebook = open_notebook("marks.ipynb", LAB, *(
        f"lab.send({answers(higher, lower)!r})" for higher, lower, _ in PARTINGS))
    notebook.run_cell(0)
    lab = notebook.lab()
    for index, (higher, lower, marks) in enumerate(PARTINGS):
        notebook.run_cell(1 + index)
        answer = column(lab, "nano-1").locator(".cl-answer")
        answer.locator(f":scope:has-text('{lower}')").wait_for()
        assert lab.locator("mark").all_inner_texts() == marks
        assert answer.inner_text().removesuffix("\u23f9") == lower
        assert column(lab, "nano-2").locator(".cl-answer").inner_text() == higher


def violations(notebook: Notebook) -> list[str]:
    """What axe finds serious or critical in the lab, and where."""
    notebook.page.evaluate(Path(os.environ["TEST_AXE"]).read_text())
    result = notebook.page.evaluate("() => axe.run('.cloister-lab')")
    return [f"{each['id']}: {node['html']} {node['failureSummary']}"
            for each in result["violations"] if each["impact"] in ("serious", "critical")
            for node in each["nodes"]]


@pytest.mark.skipif("TEST_AXE" not in os.environ, reason="TEST_AXE does not name an axe.min.js")
def test_axe_finds_nothing_serious_in_either_theme_wide_or_narrow(open_notebook: Open) -> None:
    notebook, lab = answered(open_notebook, "axe.ipynb")
    lab.locator(".cl-badge summary").click()
    lab.locator(".cl-sampling summary").click()
    for theme in ("Light", "Dark", "Dark High Contrast"):
        notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        for name, width in (("wide", 1280), ("narrow", 640)):
            notebook.page.set_viewport_size({"width": width, "height": 1100})
            notebook.page.wait_for_timeout(500)
            notebook.screenshot(f"{theme.lower().replace(' ', '-')}-{name}")
            assert violations(notebook) == []
    notebook.command("apputils:change-theme", theme="JupyterLab Light")


def test_the_whole_flow_goes_by_keyboard(open_notebook: Open) -> None:
    notebook = open_notebook("keys.ipynb", LAB)
    notebook.run_cell(0)
    lab, keyboard = notebook.lab(), notebook.page.keyboard
    field(lab, "Prompt").focus()
    keyboard.type("wake me up at eight")
    keyboard.press("Tab")
    focused = notebook.page.evaluate("() => document.activeElement.innerText")
    assert focused == "Add picture or recording"
    keyboard.press("Tab")
    keyboard.press("ArrowDown")
    assert field(lab, "System prompt").input_value() == "call"
    keyboard.press("Control+Enter")
    wait_for_end(lab)
    assert notebook.page.locator(".jp-Cell").count() == 1  # JupyterLab's own meaning of the keys
    for key in ("]", "]", "["):
        keyboard.press("Shift+Tab")
        lab.locator(".cl-answer").first.focus()
        keyboard.press(key)
        focused = notebook.page.evaluate("() => document.activeElement.tagName")
        assert focused == "MARK"
    long_answers(lab)
    field(lab, "Prompt").press("Meta+Enter")
    column(lab, "nano-2").locator(".cl-state:has-text('answers')").wait_for()
    keyboard.press("Escape")
    wait_for_end(lab, "stopped")
    said = column(lab, "nano-2").locator(".cl-answer")
    before = said.inner_text()
    field(lab, "Prompt").fill("")
    keyboard.press("Control+Enter")
    lab.locator(".cl-alert:has-text('There is no prompt')").wait_for()
    assert before and said.inner_text() == before  # a slip of the keys costs no answer
