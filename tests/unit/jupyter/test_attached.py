"""Files of a page are asked about once they are whole, and nothing of them is saved."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ipywidgets import Widget
from tests.unit.runtime.conftest import LETTERS, FakeEngine, make_media_bundle
from tests.unit.runtime.served import Served, png

from cloister import reference
from cloister.bundle import Bundle
from cloister.errors import SettingError
from cloister.parts import LIMIT_BYTES, Audio, Image, Picture
from cloister_jupyter import runs, talk
from cloister_jupyter.attached import MOST, Attached, kinds_of
from cloister_jupyter.chat import ChatWidget
from cloister_jupyter.lab import PromptLab

PIXELS = np.random.default_rng(3).integers(0, 256, (4, 6, 3), np.uint8)
SEEN = Picture(data=PIXELS.transpose(2, 0, 1).tobytes(), height=4, width=6)
FILE = png(PIXELS, Place="a most private place")


def attach(id_: str, data: bytes = FILE, kind: str = "image", *, size: int = 50) -> list[Any]:
    """The messages in which a page sends a file."""
    pieces = [data[at:at + size] for at in range(0, max(1, len(data)), size)]
    return [{"type": "attach", "id": id_, "kind": kind, "whole": number == len(pieces) - 1,
             "data": base64.b64encode(piece).decode()} for number, piece in enumerate(pieces)]


@pytest.fixture
def refused() -> list[Any]:
    return []


@pytest.fixture
def attached(refused: list[Any]) -> Attached:
    return Attached(refused.append)


def test_a_file_comes_in_parts_and_is_there_once_it_is_whole(attached: Attached) -> None:
    *parts, last = attach("a")
    for part in (*parts, *attach("b", b"", "audio")):
        attached.receive(part)
    with pytest.raises(SettingError, match="no longer"):
        attached.parts(["a"])
    attached.receive(last)
    assert attached.parts(["b", "a"]) == (Audio(data=b""), Image(data=FILE))
    attached.receive({"type": "remove", "ids": ["a", "never there"]})
    with pytest.raises(SettingError, match="no longer"):
        attached.parts(["a"])
    assert "private" not in repr(attached) + repr(attached.parts(["b"]))


def test_what_is_no_file_is_refused_by_its_id(attached: Attached, refused: list[Any]) -> None:
    attached.receive({**attach("a")[0], "data": "zebra!"})
    large = {"type": "attach", "id": "b", "kind": "audio", "whole": False,
             "data": base64.b64encode(bytes(LIMIT_BYTES)).decode()}
    attached.receive(large)
    attached.receive({**attach("b")[-1], "kind": "audio"})
    assert [each["id"] for each in refused] == ["a", "b"]
    assert "no file" in refused[0]["message"]
    assert "32 MiB" in refused[1]["message"]
    for message in ({"type": "attach"}, {"type": "remove", "ids": 5},
                    {**attach("a")[0], "kind": "film"}):
        with pytest.raises(SettingError):
            attached.receive(message)
    with pytest.raises(SettingError):
        attached.parts(["b"])


def test_files_that_a_page_left_behind_do_not_pile_up(attached: Attached) -> None:
    for number in range(MOST + 1):
        for part in attach(str(number)):
            attached.receive(part)
    with pytest.raises(SettingError):
        attached.parts(["0"])
    assert len(attached.parts([str(number) for number in range(1, MOST + 1)])) == MOST


def test_the_kinds_are_those_of_the_bundles(media_path: Path, tmp_path: Path) -> None:
    assert kinds_of([media_path]) == ["image", "audio"]
    assert kinds_of([reference.bundle_path("nano-1"), tmp_path / "none.cloister"]) == (
        kinds_of([reference.bundle_path("nano-1")]))


# In the widgets.


@pytest.fixture
def media_path(tmp_path: Path, tokenizer_dir: Path) -> Path:
    bundle: Bundle = make_media_bundle(tmp_path / "media.cloister", tokenizer_dir)
    return bundle.path


@pytest.fixture
def served(media_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """What the widgets' workers are."""
    made = Served(FakeEngine(media_path, LETTERS))
    for module in (talk, runs):
        monkeypatch.setattr(module, "Worker", lambda *_, **__: made)
    return made


class Heard:
    """Keeps what a widget sends."""

    def send(self, content: Any, buffers: Any = None) -> None:
        self.__dict__.setdefault("sent", []).append(json.loads(json.dumps(content)))

    def of(self, kind: str) -> list[Any]:
        return [message for message in self.__dict__.get("sent", []) if message["type"] == kind]


class Chat(Heard, ChatWidget):
    """A chat whose messages are kept."""

    def ask(self, prompt: str, after: int, **more: Any) -> list[Any]:
        """Ask, and return what was said."""
        self.receive({"type": "ask", "run": secrets.token_hex(4), "prompt": prompt, "after": after,
                      "sampling": {}, "max_tokens": 3, **more})
        assert self._talk.wait(30)
        return [(each["role"], each["media"], each["text"])
                for each in self.of("snapshot")[-1]["messages"]]


class Lab(Heard, PromptLab):
    """A lab whose messages are kept."""


@pytest.fixture
def chat(served: Served, media_path: Path) -> Iterator[Chat]:
    made = Chat(media_path)
    yield made
    made.close()


def shown(served: Served) -> list[str]:
    """What the model was shown."""
    return served.engine.program.encoded


def test_a_file_is_asked_about_with_the_text_and_what_stands_in_the_page_is_its_size(
    chat: Chat, served: Served
) -> None:
    assert chat.takes == ["image", "audio"]
    for part in attach("a"):
        chat.receive(part)
    said = chat.ask("so?", 0, media=["a"])
    assert said[0] == ("user", ["picture 6 x 4"], "so?")
    (asked,) = chat.of("asked")
    assert asked["media"] == ["picture"]  # it is not decoded yet
    assert chat._talk.messages[0].content == (SEEN, "so?")
    assert chat.ask("", 2, media=["a"])[2] == ("user", ["picture 6 x 4"], "")
    everything = json.dumps([Widget.get_manager_state(drop_defaults=False), repr(chat)]) + str(
        chat._repr_mimebundle_())
    assert "takes" in everything
    for data in (FILE, SEEN.data):
        for shift in range(3):
            assert base64.b64encode(bytes(shift) + data[:40])[4:-4].decode() not in everything


def test_a_question_that_is_asked_again_or_edited_keeps_its_pictures(chat: Chat) -> None:
    for part in attach("a"):
        chat.receive(part)
    chat.ask("so?", 0, media=["a"])
    chat.receive({"type": "remove", "ids": ["a"]})
    assert chat.ask("so?", 0, again=True)[0] == ("user", ["picture 6 x 4"], "so?")
    assert chat.ask("else?", 0, again=True)[0] == ("user", ["picture 6 x 4"], "else?")
    assert chat._talk.messages[0].content == (SEEN, "else?")
    assert chat.ask("plain", 0)[0] == ("user", [], "plain")
    assert chat.ask("x", 2, again=True)[2] == ("user", [], "x")  # nothing stood there


@pytest.mark.parametrize(("data", "kind", "error"), [
    (b"%PDF", "image", "no PNG"), (FILE, "audio", "no WAV"),
])
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence_and_can_be_asked_again(
    chat: Chat, data: bytes, kind: str, error: str
) -> None:
    for part in attach("a", data, kind):
        chat.receive(part)
    assert chat.ask("so?", 0, media=["a"]) == []
    (failed,) = chat.of("failed")
    assert error in failed["message"]
    assert chat._attached.parts(["a"])
    chat.ask("so?", 0, media=["b"])
    assert "no longer" in chat.of("invalid")[-1]["message"]
    chat.ask("", 0)
    assert "type one first" in chat.of("invalid")[-1]["message"]


def test_a_lab_asks_each_tier_about_a_file_and_tells_what_it_is(
    served: Served, media_path: Path
) -> None:
    lab = Lab([], [media_path, reference.bundle_path("nano-1")])
    try:
        assert lab.takes == ["image", "audio"]
        for part in attach("a"):
            lab.receive(part)
        lab.receive({"type": "run", "run": "r", "columns": ["0"], "prompt": "so?", "media": ["a"],
                     "sampling": {}, "max_tokens": 3, "system": None})
        until(lambda: lab.of("over"))
        assert lab.of("ended")
        assert shown(served) == ["picture"]
        assert lab.results()[0]["prompt"] == "[picture]\nso?"
        state = json.dumps(Widget.get_manager_state(drop_defaults=False))
        assert base64.b64encode(FILE)[:40].decode() not in state
    finally:
        lab.close()


def until(met: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)
