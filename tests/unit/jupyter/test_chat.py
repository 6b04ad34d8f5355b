"""A conversation in a notebook: answered on a thread, gone back in, sealed and forgotten."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ipywidgets import Widget

from cloister import open_vault
from cloister.audit.notebook import Trail
from cloister.errors import BundleError, SettingError, WrongPassphrase
from cloister.runtime.chat import Ask, Token
from cloister.settings import Settings
from cloister.vault.keys import Provider
from cloister.vault.local import keyholder
from cloister.vault.namespace import Kind
from cloister.vault.store import Vault
from cloister_jupyter.chat import ChatWidget

LONG = {"sampling": {"temperature": 9.0, "seed": 2}, "max_tokens": 1500}


class Heard(ChatWidget):
    """A chat whose messages are kept; made with none of its own."""

    def send(self, content: Any, buffers: Any = None) -> None:
        self.sent.append(json.loads(json.dumps(content)))

    @property
    def sent(self) -> list[Any]:
        return self.__dict__.setdefault("_sent", [])  # type: ignore[no-any-return]

    def of(self, kind: str) -> list[Any]:
        return [message for message in self.sent if message["type"] == kind]

    def ask(self, text: str, after: int, **changes: Any) -> None:
        self.receive({"type": "ask", "run": f"t{len(self.sent)}", "prompt": text, "after": after,
                      "sampling": {}, "max_tokens": 24, **changes})

    def until(self, met: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not met():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """Let no answer go past its eighth token before the event is set, once for each."""
        session, event = self._talk._load(), threading.Event()
        answer = session.answer

        def held(ask: Ask) -> Iterator[Token]:
            for count, token in enumerate(answer(ask)):
                yield token
                if count == 7:
                    assert event.wait(60)
                    event.clear()

        monkeypatch.setattr(session, "answer", held)
        return event

    def said(self) -> list[str]:
        """What was said, once the turn at hand is over."""
        assert self._talk.wait(60)
        return [message["text"] for message in self.of("snapshot")[-1]["messages"]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("HOME", str(tmp_path)), ("PROVIDER", "keyfile")):
        monkeypatch.setenv(f"CLOISTER_{name}", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def begin() -> Iterator[Callable[..., Heard]]:
    begun: list[Heard] = []

    def one(**options: Any) -> Heard:
        begun.append(Heard(options.pop("model", "nano-1"), **{"system": "call", **options}))
        return begun[-1]

    yield one
    for chat in begun:
        chat.close()


def test_an_answer_is_told_in_order_and_a_later_page_is_told_all_of_it(
    begin: Callable[..., Heard]
) -> None:
    chat = begin()
    chat.ask("wake me up at eight", 1)
    said = chat.said()
    events = [message for message in chat.sent if "seq" in message]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events if event["type"] != "delta"] == [
        "asked", "ready", "ended", "snapshot"]
    assert said[:2] == ["call", "wake me up at eight"]
    assert said[2] == "".join(event["text"] for event in chat.of("delta"))
    (ended,), shown = chat.of("ended"), chat.of("snapshot")[-1]
    assert ended["tokens"] == sum(event["tokens"] for event in chat.of("delta")) > 3
    assert shown["used"] == ended["tokens"] + ended["prompt_tokens"] <= shown["context"]
    (call,) = shown["messages"][2]["calls"]
    assert json.loads(call)["name"] in said[2]
    chat.receive({"type": "open"})
    assert chat.of("snapshot")[-1] == {**shown, "seq": shown["seq"] + 1}
    state = json.dumps(Widget.get_manager_state(drop_defaults=False))
    for text in said[1:]:
        assert text not in state + repr(chat) + repr(chat._talk) + str(chat._repr_mimebundle_())


def test_an_answer_is_made_again_and_an_earlier_message_edited(
    begin: Callable[..., Heard]
) -> None:
    chat = begin()
    chat.ask("wake me up at eight", 1)
    first = chat.said()
    chat.ask("play some jazz", 3)
    both = chat.said()
    chat.ask("play some jazz", 3)  # greedy
    assert chat.said() == both
    chat.ask("book a table in Denver", 1)
    edited = chat.said()
    assert (len(edited), edited[1]) == (3, "book a table in Denver")
    assert edited[2] != first[2]
    chat.ask("lazy " * 3000, 1)
    assert chat.said() == edited
    assert chat.of("failed")[-1]["kind"] == "ContextExceeded"
    chat.ask("jazz", 7)
    assert "from 1 to the 3 messages" in [chat.said(), chat.of("failed")[-1]["message"]][1]


def test_a_stop_keeps_what_came_and_a_second_one_ends_a_process_that_is_deaf(
    begin: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = begin(system="story")
    heard = chat.hold(monkeypatch)
    chat.ask("once upon a time", 1, **LONG)
    chat.until(lambda: chat.of("delta"))
    chat.receive({"type": "open"})
    midway = chat.of("snapshot")[-1]
    assert (midway["text"], midway["after"]) == ("once upon a time", 1)
    assert midway["answer"]
    chat.ask("another", 1)
    assert chat.of("invalid")[-1]["busy"]
    chat.receive({"type": "stop", "run": "another"})
    began = time.monotonic()
    chat.receive({"type": "stop", "run": midway["turn"]})
    heard.set()
    said = chat.said()
    print(f"stopped after {1000 * (time.monotonic() - began):.0f} ms")
    assert chat.of("ended")[-1]["finish"] == "stop"
    assert said[2].startswith(midway["answer"])
    before = len(chat.of("delta"))
    chat.ask("and then", 3, **LONG)
    chat.until(lambda: len(chat.of("delta")) > before)
    chat._talk._turn.stopping.set()  # type: ignore[union-attr]  # as if the first went unheard
    chat.receive({"type": "stop", "run": chat.of("asked")[-1]["turn"]})
    heard.set()
    assert chat.said()[3] == "and then"
    chat.until(lambda: chat._talk._worker.running is False)


def test_where_the_context_is_full_an_earlier_message_is_a_way_on(
    begin: Callable[..., Heard]
) -> None:
    chat = begin(system="story")
    chat.ask("once upon a time", 1, **LONG)
    full = chat.said()
    assert chat.of("ended")[-1]["finish"] == "context"
    shown = chat.of("snapshot")[-1]
    assert shown["used"] >= shown["context"] - 1
    chat.ask("and then", 3)
    assert chat.said() == full
    assert chat.of("failed")[-1]["kind"] == "ContextExceeded"
    chat.ask("once upon a time", 1)
    assert len(chat.said()) == 3 and chat.of("ended")[-1]["finish"] == "length"


def test_a_question_that_is_stopped_while_the_bundle_loads_is_not_kept(
    begin: Callable[..., Heard]
) -> None:
    chat = begin()
    chat.ask("wake me up at eight", 1)
    chat.receive({"type": "stop", "run": "t0"})
    assert chat.said() == ["call"]
    assert chat.of("ended")[-1]["finish"] == "stop"
    chat.ask("wake me up at eight", 1)
    assert len(chat.said()) == 3


def test_a_worker_that_dies_leaves_a_conversation_that_goes_on(
    begin: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = begin(session="dies", system="story")
    killed = chat.hold(monkeypatch)
    chat.ask("once upon a time", 1, **LONG)
    chat.until(lambda: chat.of("delta"))
    chat._talk._worker.ready()._child.kill()
    killed.set()
    said = chat.said()
    assert "ended without an answer" in chat.of("failed")[-1]["message"]
    assert said[1] == "once upon a time" and said[2]
    killed.set()
    chat.ask("and then", 3)
    again = chat.said()
    assert again[:4] == [*said, "and then"] and len(again) == 5
    assert chat.of("ready")[-1]["load_s"] is not None


def test_a_session_is_gone_on_with_and_its_texts_have_fingerprints(
    begin: Callable[..., Heard]
) -> None:
    question = "wake me up at eight tomorrow in the morning please"
    first = begin(session="work", namespace="me")
    assert first.of("snapshot") == []
    first.ask(question, 1)
    said = first.said()
    shown = first.of("snapshot")[-1]
    assert "key" in shown["notice"]
    first.close()
    second = begin(session="work", namespace="me", system=None)
    second.receive({"type": "open"})
    assert second.said() == said
    assert second.of("snapshot")[-1]["used"] >= shown["used"] - 1  # the last token is not read
    groups = {title: dict(rows) for title, rows in second.of("badge")[-1]["groups"]}
    assert "sealed" in second.of("badge")[-1]["summary"]
    assert "keyfile" in groups["What is kept"]["the vault's key"]
    assert "Model process of nano-1" in groups
    with open_vault() as vault:
        trail = Trail(vault.namespace("me"), Kind.HISTORY)
        for text in said[1:]:
            assert trail.fingerprints.of(text) <= trail.known
    second.receive({"type": "forget", "run": "f"})
    assert second.said() == ["call"]
    assert second._talk._worker.running is False
    other = begin(session="work", namespace="me", system="other")  # of the same name
    assert [message.content for message in other._talk.messages] == ["other"]


def test_the_process_tries_to_reach_out_when_it_is_asked_to(
    begin: Callable[..., Heard]
) -> None:
    chat = begin()
    chat.receive({"type": "probe", "run": "p"})
    chat.said()
    told = chat.of("badge")[-1]
    assert "tried to reach out" in told["summary"] or "NOT refused" in told["summary"]
    assert told["groups"][0][0].startswith("Tried to reach out at")


def test_two_widgets_of_one_session_do_not_write_over_each_other(
    begin: Callable[..., Heard]
) -> None:
    one, two = begin(session="both"), begin(session="both")
    one.ask("wake me up at eight", 1)
    said = one.said()
    two.ask("play some jazz", 1)
    assert two.said() == ["call"]
    assert two.of("failed")[-1]["kind"] == "SessionMismatch" and not two.of("delta")
    two.receive({"type": "reopen", "run": "again"})
    assert two.said() == said
    two.ask("play some jazz", 3)
    assert two.said()[:4] == [*said, "play some jazz"]


def test_a_passphrase_is_asked_for_once_in_the_cell(
    begin: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOISTER_PROVIDER")
    settings = Settings.from_environment()
    Vault.create(
        settings.vault, keyholder(settings, lambda: "open sesame"), Provider.PASSPHRASE).close()
    answers = iter(["wrong", "open sesame"])
    monkeypatch.setattr("cloister_jupyter.chat.getpass", lambda prompt: next(answers))
    with pytest.raises(WrongPassphrase):
        begin(session="work")
    chat = begin(session="work")
    chat._talk._worker.close()
    chat.ask("wake me up at eight", 1)  # another process, and nobody is asked
    assert len(chat.said()) == 3
    rows = dict(chat.of("badge")[-1]["groups"][0][1])
    assert "stays in this kernel's memory" in rows["passphrase"]
    assert "sesame" not in repr(vars(chat)) + repr(vars(chat._talk))

    def nobody(prompt: str) -> str:
        raise NotImplementedError

    monkeypatch.setattr("cloister_jupyter.chat.getpass", nobody)
    with pytest.raises(SettingError, match="CLOISTER_PASSPHRASE"):
        begin(session="other")


@pytest.mark.parametrize(("changes", "words"), [
    ({"sampling": {"temperature": "zanzibar"}}, "not of its kind"),
    ({"sampling": {"temperature": -1}}, "at least 0"),
    ({"prompt": ""}, "type one first"),
    ({"prompt": "zanzibar" * 12_500}, "100,000 bytes and the lab takes 65,536"),
    ({"after": "zanzibar"}, "not of its kind"),
    ({"after": -1}, "at least 0"),
    ({"max_tokens": 0}, "at least 1"),
    ({"type": "zanzibar"}, "no message"),
])
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    begin: Callable[..., Heard], changes: dict[str, Any], words: str
) -> None:
    chat = begin()
    chat.ask(**{"text": "a", "after": 1, **changes})
    (invalid,) = chat.of("invalid")
    assert words in invalid["message"] and "zanzibar" not in invalid["message"]
    assert not chat.of("asked")


def test_a_model_that_is_none_is_refused_in_the_cell(
    begin: Callable[..., Heard], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="nano-1"):
        begin(model="nano-7")
    with pytest.raises(SettingError, match="session is a text"):
        begin(session=7)
    with pytest.raises(BundleError):
        begin(model=tmp_path / "gone.cloister", session="work")
    chat = begin(model=tmp_path / "gone.cloister")
    chat.ask("a", 1)
    assert chat.said() == ["call"] and chat.of("failed")[-1]["kind"].startswith("Bundle")
