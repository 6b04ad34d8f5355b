"""The lab's end in the kernel: messages in, messages out, and no word of them in its state."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ipywidgets import Widget

import cloister_jupyter
from cloister import open_vault
from cloister.errors import SettingError
from cloister.guard import Attempt
from cloister.settings import Settings
from cloister_jupyter import PromptLab
from cloister_jupyter.badge import badge
from cloister_jupyter.runs import Probed

STATIC = Path(cloister_jupyter.__file__).parent / "static"
RUN: dict[str, Any] = {
    "type": "run", "run": "r", "columns": ["0"], "prompt": "remind me of the zanzibar ferry",
    "system": "call", "sampling": {}, "max_tokens": 40,
}


class Heard(PromptLab):
    """A lab whose messages are kept."""

    def send(self, content: Any, buffers: Any = None) -> None:
        self.__dict__.setdefault("sent", []).append(json.loads(json.dumps(content)))

    def of(self, kind: str) -> list[Any]:
        return [message for message in self.__dict__.get("sent", []) if message["type"] == kind]

    def answered(self) -> str:
        assert self._runs.wait(60)
        return "".join(text for delta in self.of("delta") for text in delta["texts"])


@pytest.fixture(scope="module")
def shared() -> Iterator[Heard]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        lab = Heard(["nano-1"])
        yield lab
        lab.close()


@pytest.fixture
def lab(shared: Heard) -> Heard:
    shared.__dict__["sent"] = []
    return shared


def test_a_run_is_told_in_messages_and_a_later_page_is_told_all_of_it(lab: Heard) -> None:
    lab.receive(RUN)
    text = lab.answered()
    assert lab.prompts() == [RUN["prompt"]]
    events = [message for message in lab.sent if "seq" in message]
    assert [event["seq"] for event in events] == list(range(len(events)))
    lab.sent.clear()
    lab.receive({"type": "open"})
    (snapshot,) = lab.of("snapshot")
    assert snapshot["request"] == {name: RUN[name] for name in (
        "run", "columns", "prompt", "system")}
    assert [event["type"] for event in snapshot["events"]] == [
        "began", "ready", "delta", "ended", "over"]
    assert "".join(snapshot["events"][2]["texts"]) == text
    assert snapshot["events"][-1]["seq"] == events[-1]["seq"]


def test_what_a_notebook_file_may_keep_holds_no_word_of_a_run(lab: Heard) -> None:
    lab.receive(RUN)
    text = lab.answered()
    assert len(text) > 10
    state = json.dumps(Widget.get_manager_state(drop_defaults=False))
    assert "nano-1" in state
    for said in (RUN["prompt"], "zanzibar", text):
        assert said not in state
        assert said not in repr(lab) and said not in repr(lab._runs.request)
        assert said not in str(lab._repr_mimebundle_())


@pytest.mark.parametrize(("changes", "words"), [
    ({"sampling": {"temperature": "zanzibar"}}, "not of its kind"),
    ({"sampling": {"surprise": 1}}, "not of its kind"),
    ({"sampling": {"temperature": -1}}, "at least 0"),
    ({"prompt": None}, "not of its kind"),
    ({"prompt": ""}, "type one first"),
    ({"prompt": "zanzibar" * 10_000}, "80,000 bytes and the lab takes 65,536"),
    ({"columns": []}, "at least one"),
    ({"columns": ["zanzibar"]}, "choose another"),
    ({"max_tokens": 0}, "at least 1"),
    ({"type": "zanzibar"}, "no message"),
])
def test_a_request_that_cannot_be_is_refused_in_a_sentence(
    lab: Heard, changes: dict[str, Any], words: str
) -> None:
    lab.receive({**RUN, **changes})
    (invalid,) = lab.of("invalid")
    assert words in invalid["message"] and "zanzibar" not in invalid["message"]
    assert invalid["message"].endswith(".") and not lab.of("began")
    lab.receive(None)
    assert len(lab.of("invalid")) == 2


@pytest.mark.parametrize("message", [
    {**RUN, "run": "\ud800"}, {"type": "grid.take", "name": "\ud800"},
    {"type": "grid.run", "run": "r", "columns": ["0"], "name": "g", "form": {"system": "\ud800"}},
    {"type": "votes.begin", "prompts": ["\ud800"]}, {"type": "history.find", "words": "\ud800"},
])
def test_half_a_character_is_refused_since_no_page_could_be_told_of_it(
    lab: Heard, message: dict[str, Any]
) -> None:
    lab.receive(message)
    assert [each["message"] for each in lab.sent] == [
        "What was typed holds half a character; type it anew."]


def test_the_page_asks_for_scores_for_what_else_was_likely_and_for_a_branch(lab: Heard) -> None:
    lab.receive(RUN)
    text = lab.answered()
    rows = lab.results()
    lab.receive({"type": "score", "run": "r"})
    assert lab._runs.wait(60)
    (scored,) = lab.of("scored")
    texts = [text for delta in lab.of("delta") for text in delta["texts"]]
    assert (scored["by"], scored["at"], len(scored["ranks"])) == ("0", 0, len(texts))
    lab.receive({"type": "likeliest", "run": "r", "column": "0", "start": 1})
    told = waited(lab, "likeliest")
    assert (told["column"], told["at"], len(told["rows"])) == ("0", 1, min(24, len(texts) - 1))
    (first, *others), higher, chosen = told["rows"][0]
    assert (first[0], first[1], higher, len(others)) == (chosen, texts[1], None, 4)
    assert first[2] == scored["logprobs"][1]
    lab.receive({"type": "branch", "run": "r", "parent": "0", "at": 1, "id": others[0][0]})
    assert lab._runs.wait(60)
    branch = [text for delta in lab.of("delta") if delta["column"] == "0.0"
              for text in delta["texts"]]
    assert branch[:2] == [texts[0], others[0][1]] and "".join(branch) != text
    assert lab.results() == rows  # a branch is no answer to the request
    lab.sent.clear()
    lab.receive({"type": "open"})
    kinds = [event["type"] for event in lab.of("snapshot")[0]["events"]]
    assert kinds[-5:] == ["began", "ready", "delta", "ended", "over"] and "branched" in kinds
    for wrong in ({"type": "score", "run": "gone"}, {"type": "branch", "run": "r"},
                  {"type": "branch", "run": "r", "parent": "0", "at": 999, "id": 1},
                  {"type": "likeliest", "run": "r", "column": "7", "start": 0}):
        lab.sent.clear()
        lab.receive(wrong)
        (invalid,) = lab.of("invalid")
        assert (invalid["about"], invalid["run"]) == (wrong["type"], wrong["run"])
        assert invalid["message"].endswith(".")


def waited(lab: Heard, kind: str) -> Any:
    """The last message of a kind, once it is sent."""
    deadline = time.monotonic() + 30
    while not lab.of(kind):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return lab.of(kind)[-1]


def test_the_badge_tells_of_every_probe_whether_it_got_out(lab: Heard) -> None:
    for _ in range(2):
        lab.sent.clear()
        lab.receive({"type": "probe"})
        told = waited(lab, "badge")
        assert "tried to reach out, refused" in told["summary"]
        title, rows = told["groups"][0]
        assert title.startswith("Tried to reach out at") and len(rows) == 6
    open_ = Attempt(name="a way out", refused=False, how="NOT refused (it went through)")
    found = badge({}, probed=Probed(at="now", attempts={"a": (open_,), "b": (open_,)}, failed=(
        "c: It ended.",)))
    assert "NOT refused just now: a way out" in found.summary
    assert [title for title, _ in found.groups[:2]] == [
        "Tried to reach out at now, from the processes of a, b", "Could not try at now"]


def test_the_badge_says_what_the_processes_tried_and_what_is_kept(lab: Heard) -> None:
    before = badge({})
    assert before.tier is None and "not known" in before.summary
    lab.receive(RUN)
    lab.answered()
    lab.receive({"type": "open"})
    told = lab.of("badge")[-1]
    welcome = lab._runs.welcomes["0"]
    assert told["tier"] == welcome.guard_tier
    groups = {title: dict(rows) for title, rows in told["groups"]}
    evidence = groups["Model process of nano-1"]
    assert evidence.items() >= welcome.evidence.items()
    assert "nothing" in groups["What is kept"]["prompts and answers"]
    assert "What is not guarded" in groups
    twice = badge({"a": welcome, "b": welcome})
    assert twice.groups[-1][0] == "Model processes of a, b"


def test_the_badge_knows_of_the_vault(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, data=None, provider="keyfile")

    def vault() -> str:
        return dict(badge({}, settings).groups[0][1])["vault on this machine"]

    assert vault().startswith("none")
    open_vault(settings=settings, create=True, notify=lambda notice: None).close()
    assert "keyfile" in vault()
    (tmp_path / "vault" / "vault.db").write_bytes(b"damaged" * 1000)
    assert "cannot be read" in vault()


def test_a_lab_of_no_such_tier_is_refused() -> None:
    with pytest.raises(SettingError, match="nano-1"):
        PromptLab(["nano-7"])


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_the_page_loads_nothing_keeps_nothing_and_makes_no_markup_of_text(path: Path) -> None:
    found = re.findall(
        r"https?:|@import|url\(|\bimport\b|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|localStorage"
        r"|sessionStorage|indexedDB|[a-z]+HTML\b|document\.write|eval\(|Function\(|\.cookie",
        path.read_text("utf-8"))
    assert found == []
