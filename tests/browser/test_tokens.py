"""Tokens in a real browser: how likely each was, a branch at another, and what was expected."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.browser.test_lab import (
    Open,
    choose,
    column,
    long_answers,
    violations,
    wait_for_end,
)

import cloister_jupyter

pytestmark = pytest.mark.slow

EXPECTED = '{"name": "BookRestaurant", "arguments": {"party_size_number": "five", "time": "noon"}}'


def shown_as_tokens(lab: Any) -> None:
    lab.get_by_role("button", name="Tokens").click()
    wait_for_end(lab)
    lab.locator(".cl-column:last-child .cl-token[data-level]").last.wait_for()


def test_each_token_tells_how_likely_it_was_and_another_is_gone_on_from_by_keyboard(
    open_notebook: Open
) -> None:
    notebook = open_notebook(
        "tokens.ipynb", "from cloister_jupyter import PromptLab\nPromptLab(['pro', 'nano-1'])")
    notebook.run_cell(0)
    lab, keyboard = notebook.lab(), notebook.page.keyboard
    choose(lab, prompt="book a table for four at an italian restaurant in Denver")
    lab.get_by_label("Expected answer").fill(EXPECTED)
    lab.get_by_role("button", name="Run", exact=True).click()
    wait_for_end(lab)
    nano = column(lab, "nano-1")
    text = nano.locator(".cl-original .cl-answer").inner_text()
    rows = nano.locator("tbody tr").all_inner_texts()
    for field, result in (("name", "same"), ("party_size_number", "differs"), ("time", "missing"),
                          ("city", "extra")):
        assert [row for row in rows if field in row and result in row], (field, rows)
    assert nano.locator(".cl-wordwise del").first.text_content().startswith(" missing: ")
    label = nano.locator(".cl-strip").get_attribute("aria-label")
    assert "tokens stand as in the answer of pro" in label and "% of its" in label
    shown_as_tokens(lab)
    tokens = nano.locator(".cl-original .cl-token")
    assert "".join(tokens.all_inner_texts()) == text + "\u25a0"
    assert nano.locator(".cl-original .cl-by").inner_text() == "as pro sees it"
    assert column(lab, "pro").locator(".cl-by").inner_text() == "as pro itself sees it"
    popover = lab.locator(".cl-popover")
    tokens.nth(1).hover()
    popover.locator("p:has-text('token 2 of')").wait_for()
    lab.get_by_label("Background of tokens").select_option("probability")
    assert all(number in ("<0.1", *map(str, range(101))) or float(number) < 10
               for number in tokens.evaluate_all("all => all.map((each) => each.dataset.number)"))
    lab.get_by_label("Background of tokens").select_option("rank")
    tokens.first.focus()
    for _ in range(3):
        keyboard.press("ArrowRight")
    assert tokens.nth(3).evaluate("node => node === document.activeElement")
    assert tokens.nth(3).get_attribute("aria-describedby") == popover.get_attribute("id")
    popover.locator("p:has-text('likeliest to pro')").wait_for()
    assert popover.locator("button").count() == 10 and "%, rank" in popover.inner_text()
    notebook.screenshot("tokens-popover")
    keyboard.press("ArrowDown")
    other = notebook.page.evaluate("() => document.activeElement.firstChild.textContent")
    assert notebook.page.evaluate("() => document.activeElement.tagName") == "BUTTON"
    keyboard.press("Escape")
    assert tokens.nth(3).evaluate("node => node === document.activeElement")
    assert popover.is_hidden()
    keyboard.press("Home")
    keyboard.press("ArrowDown")
    keyboard.press("Escape")
    tokens.nth(3).focus()
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    branch = nano.locator(".cl-branch")
    branch.locator(".cl-token[data-level]").last.wait_for()
    wait_for_end(lab)
    assert "Branch at token 4: " in branch.locator("h4").inner_text()
    assert branch.locator(".cl-token").nth(3).inner_text().replace(" ", "\u2423") == other
    assert "4 of them given" in branch.locator(".cl-figures").inner_text()
    assert "given" not in nano.locator(".cl-original .cl-figures").inner_text()
    assert branch.locator(".cl-token").all_inner_texts()[:3] == tokens.all_inner_texts()[:3]
    notebook.screenshot("tokens-branch")
    themes(notebook, lab)


def themes(notebook: Any, lab: Any) -> None:
    """See that axe finds nothing, with the tokens of a wild answer open beside their popover."""
    lab.get_by_label("Expected answer").fill("")
    long_answers(lab)
    lab.locator(".cl-sampling").get_by_label("Tokens at most").fill("60")
    lab.get_by_role("button", name="Run", exact=True).click()
    lab.locator(".cl-column:last-child .cl-token[data-level='4']").last.wait_for()
    wait_for_end(lab)
    token = column(lab, "nano-1").locator(".cl-token[data-level='4']").first
    assert token.evaluate("node => getComputedStyle(node, '::after').content").strip('"') == (
        token.get_attribute("data-number"))
    for theme in ("Light", "Dark", "Dark High Contrast"):
        notebook.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        notebook.page.wait_for_timeout(300)
        token.scroll_into_view_if_needed()
        token.focus()
        lab.locator(".cl-popover li").first.wait_for()
        notebook.screenshot(f"tokens-{theme.lower().replace(' ', '-')}")
        if "TEST_AXE" in os.environ:
            assert violations(notebook) == []
    notebook.command("apputils:change-theme", theme="JupyterLab Light")


LAWS = """(parts) => {
    const { diff, pieces, leaves } = new Function(
        `${parts.join(';')}; return { diff, pieces, leaves };`)();
    let state = 7;
    const random = (most) => (state = (state * 48271) % 2147483647) % most;
    const longest = (a, b) => { // the plain way
        const rows = [Array(b.length + 1).fill(0)];
        a.forEach((x, i) => rows.push(b.reduce((row, y, j) => [
            ...row, x === y ? rows[i][j] + 1 : Math.max(rows[i][j + 1], row[j])], [0])));
        return rows.at(-1).at(-1);
    };
    for (let round = 0; round < 400; round++) {
        const [a, b] = [0, 1].map(() => Array.from({ length: random(9) }, () => 'xyz'[random(3)]));
        const runs = diff(a, b), said = (of, not) => runs.filter(({ kind }) => kind !== not)
            .flatMap((run) => of === 'a' ? a.slice(...run.a) : b.slice(...run.b)).join();
        const same = runs.filter(({ kind }) => kind === 'same').reduce(
            (sum, run) => sum + run.a[1] - run.a[0], 0);
        if (said('a', 'ins') !== a.join() || said('b', 'del') !== b.join()) return [a, b, runs];
        if (same !== longest(a, b)) return [a, b, same];
    }
    const [a, b] = [1, 2].map((seed) => Array.from({ length: 3000 }, (_, i) => `${seed}${i}`));
    const began = performance.now(), runs = diff(['head', ...a, 'tail'], ['head', ...b, 'tail']);
    const kinds = runs.map(({ kind }) => kind).join();
    const fields = [...leaves('{"a": {"b": [1, {}]}, "c": null}') ?? []].join(' ');
    return [kinds, performance.now() - began < 100, pieces('Is it\\n  4.5?').join('|'), fields,
            leaves('7'), leaves('[')];
}"""


def test_a_comparison_loses_nothing_and_what_is_too_long_for_one_is_replaced(browser: Any) -> None:
    page = browser.new_page()
    found = page.evaluate(LAWS, [
        (Path(cloister_jupyter.__file__).parent / "static" / f"{name}.js").read_text("utf-8")
        for name in ("text", "compare")])
    page.close()
    assert found == ["same,del,ins,same", True, "Is| it|\n  4|.|5|?",
                     "a.b[0],1 a.b[1],{} c,null", None, None]


def busiest_ms(trace: bytes) -> float:
    """Processor time of the page's longest task: waiting for a busy machine does not count."""
    events = json.loads(trace)["traceEvents"]
    page = {(each["pid"], each["tid"]) for each in events if each["name"] == "thread_name"
            and each["args"]["name"] == "CrRendererMain"}
    tasks = [each["tdur"] / 1000 for each in events if each["name"].endswith("RunTask")
             and (each["pid"], each["tid"]) in page and "tdur" in each]
    assert len(tasks) > 100
    return max(tasks)


def test_a_thousand_tokens_stay_light_with_the_token_view_open_and_scoring_stops(
    open_notebook: Open, browser: Any
) -> None:
    notebook = open_notebook(
        "heavy.ipynb", "from cloister_jupyter import PromptLab\nPromptLab(['ultra', 'nano-1'])")
    notebook.run_cell(0)
    lab = notebook.lab()
    long_answers(lab)
    lab.get_by_role("button", name="Tokens").click()
    lab.get_by_role("button", name="Run", exact=True).click()  # the processes start
    lab.locator(".cl-column:last-child .cl-token[data-level]").nth(479).wait_for()
    wait_for_end(lab)
    browser.start_tracing(page=notebook.page, categories=["toplevel"])
    notebook.received.clear()
    lab.get_by_role("button", name="Run", exact=True).click()
    lab.locator(".cl-note:text-is('scoring\u2026')").wait_for()
    size = sum(notebook.received)
    lab.locator(".cl-column:last-child .cl-token[data-level]").nth(479).wait_for()
    wait_for_end(lab)
    tokens = lab.locator(".cl-token").count()
    scores = sum(notebook.received) - size
    column(lab, "nano-1").locator(".cl-token").nth(200).focus()
    lab.locator(".cl-popover li").first.wait_for()
    top = sum(notebook.received) - size - scores
    most_ms = busiest_ms(browser.stop_tracing())
    print(f"{size / 1000:.1f} kB for {tokens} tokens, {scores / 1000:.1f} kB for how likely they "
          f"were, {top / 1000:.1f} kB to look at one; longest task {most_ms:.0f} ms")
    assert tokens == 1800 and size / tokens < 100 and scores / tokens < 50 and most_ms < 100
    lab.evaluate("""(root) => {
        const note = root.querySelector('.cl-toolbar > .cl-note');
        let began = 0;
        new MutationObserver((_, observer) => {
            if (!began && note.textContent.startsWith('scoring')) {
                began = performance.now();
                root.querySelector('.cl-stop').click();
            } else if (began && note.textContent === 'stopped') {
                root.dataset.stoppedMs = performance.now() - began;
                observer.disconnect();
            }
        }).observe(note, {childList: true, characterData: true});
    }""")
    lab.get_by_role("button", name="Run", exact=True).click()
    wait_for_end(lab, "stopped")
    print(f"scoring stopped after {float(lab.get_attribute('data-stopped-ms')):.0f} ms")
    assert column(lab, "nano-1").locator(".cl-by").inner_text().endswith((
        "as nano-1 itself sees it", "from there as nano-1 itself does"))
    lab.get_by_role("button", name="Tokens").click()
    lab.get_by_role("button", name="Tokens").click()  # what is missing is asked for again
    lab.locator(".cl-by:text-is('as ultra sees it')").wait_for()
    wait_for_end(lab)


def test_the_badge_tries_to_reach_out_before_and_after_a_model_was_started(
    open_notebook: Open
) -> None:
    notebook = open_notebook(
        "probe.ipynb", "from cloister_jupyter import PromptLab\nPromptLab(['nano-1'])")
    notebook.run_cell(0)
    lab = notebook.lab()
    lab.locator(".cl-badge summary").click()
    lab.get_by_role("button", name="Try to reach out").click()
    found = lab.locator(".cl-evidence > div:has(h4:has-text('started for this'))")
    found.wait_for()
    assert found.locator("dd").all_inner_texts() == ["refused (Permission denied)"] * 6
    assert "tried to reach out, refused" in lab.locator(".cl-badge summary").inner_text()
    choose(lab)
    lab.get_by_role("button", name="Run", exact=True).click()
    wait_for_end(lab)
    lab.get_by_role("button", name="Try to reach out").click()
    lab.locator(".cl-evidence h4:has-text('from the process of nano-1')").wait_for()
    assert lab.get_by_role("button", name="Try to reach out").is_enabled()
