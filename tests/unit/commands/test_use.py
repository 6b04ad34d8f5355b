"""Files on the command line are parts of a question, in their order."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from msgspec.structs import replace
from tests.unit.runtime.conftest import LETTERS, MEDIA, FakeEngine, make_media_bundle
from tests.unit.runtime.served import Served, png

from cloister import cli
from cloister.bundle import Bundle
from cloister.commands import use
from cloister.parts import Picture, Recording
from cloister.pieces import RecordingFormat
from cloister.runtime import protocol

PIXELS = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
SEEN = Picture(data=PIXELS.transpose(2, 0, 1).tobytes(), height=4, width=6)


FORMATS = replace(MEDIA, recording=RecordingFormat(
    rate=8000, samples_per_token=800, multiple=800, most=80000))


@pytest.fixture
def served(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Served:
    """The worker that the commands start, on a fake engine."""
    bundle = make_media_bundle(tmp_path / "media.cloister", tokenizer_dir, FORMATS)
    made = Served(FakeEngine(bundle.path, LETTERS))
    monkeypatch.setattr(use, "Worker", lambda *_, **__: made)
    return made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A picture, and a recording of half a second of sound between seconds of silence."""
    silence = np.zeros(16000, np.float32)
    sound = np.sin(np.arange(8000, dtype=np.float32)) * 0.5
    (tmp_path / "a.png").write_bytes(png(PIXELS))
    soundfile.write(tmp_path / "b.wav", np.concatenate([silence, sound, silence]), 16000)
    return {name: str(tmp_path / name) for name in ("a.png", "b.wav")}


def run(*words: str, status: int = 0) -> Any:
    assert cli.main([*words, "--json"]) == status
    return None


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def contents(served: Served) -> list[Any]:
    """What the worker was asked."""
    requests = map(protocol.decode_request, served.lines)
    return [request.ask.messages[-1].content for request in requests
            if isinstance(request, protocol.Question)]


def test_files_stand_before_the_prompt_in_the_order_of_the_line(
    served: Served, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", "nano-1", "so?", "--audio", files["b.wav"], "--image", files["a.png"],
        "--audio", files["b.wav"], "--max-tokens", "3")
    (content,) = contents(served)
    heard = content[0]
    assert isinstance(heard, Recording)
    assert abs(heard.samples - 20000) < 5
    assert content == (heard, SEEN, heard, "so?")
    record = said(capsys)
    assert (record["picture_tokens"], record["recording_tokens"]) == (12, 50)
    assert record["prompt_tokens"] > 62
    assert record["encode_s"] > 0


def test_silence_is_left_out_only_where_asked(
    served: Served, files: dict[str, str]
) -> None:
    run("run", "nano-1", "so?", "--audio", files["b.wav"], "--trim", "--max-tokens", "1")
    heard = contents(served)[0][0]
    assert 4000 <= heard.samples < 8000


def test_a_picture_or_recording_needs_no_prompt_and_nothing_is_no_question(
    served: Served, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", "nano-1", "--image", files["a.png"], "--max-tokens", "1")
    run("compare", "--tiers", "nano-1", "--image", files["a.png"], "--max-tokens", "1")
    assert contents(served) == [(SEEN,), (SEEN,)]
    capsys.readouterr()
    for words in (("run", "nano-1"), ("compare", "--tiers", "nano-1")):
        run(*words, status=1)
        assert said(capsys)["message"] == (
            "Nothing is asked; give a PROMPT, --image FILE or --audio FILE.")


def test_a_picture_may_come_from_the_standard_input_and_once(
    served: Served, files: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = io.TextIOWrapper(io.BytesIO(Path(files["a.png"]).read_bytes()))
    monkeypatch.setattr(sys, "stdin", raw)
    run("run", "nano-1", "so?", "--image", "-", "--max-tokens", "1")
    assert contents(served) == [(SEEN, "so?")]
    capsys.readouterr()
    for words in (("run", "nano-1", "-", "--image", "-"),
                  ("run", "nano-1", "x", "--image", "-", "--audio", "-"),
                  ("chat", "nano-1", "--audio", "-")):
        run(*words, status=1)
        assert "tandard input" in said(capsys)["message"]


def test_a_chat_takes_files_for_the_next_question_alone(
    served: Served, files: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = (f"so?\n/image {files['a.png']}\n/image nothing\n/audio {files['b.wav']}\nand?\n"
             "then?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    run("chat", "nano-1", "--image", files["a.png"], "--max-tokens", "2")
    first, second, third = contents(served)
    assert first == (SEEN, "so?")
    assert (second[0], second[2], third) == (SEEN, "and?", "then?")
    assert isinstance(second[1], Recording)
    assert said(capsys)["failed"] == 1


@pytest.mark.parametrize(("words", "error"), [
    (("run", "nano-1", "x", "--image", "nothing.png"), "MediaUnreadable"),
    (("run", "nano-1", "x", "--image", "https://example.invalid/a.png"), "MediaUnreadable"),
    (("run", "nano-1", "x", "--audio", "{a.png}"), "MediaUnreadable"),
    (("compare", "x", "--tiers", "nano-1", "--image", "{b.wav}"), "MediaUnreadable"),
    (("run", "nano-1", "x", "--image", "{a.png}", "--replay", "out"), "SettingError"),
])
def test_a_file_that_cannot_be_taken_is_refused_by_name(
    served: Served, files: dict[str, str], capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...], error: str,
) -> None:
    run(*(files.get(word.strip("{}"), word) for word in words), status=1)
    found = said(capsys)
    assert found["error"] == error
    names = "a.png", "b.wav", "nothing.png", "example"
    assert not any(name in found["message"] for name in names)


def test_a_bundle_of_texts_refuses_a_picture_in_one_sentence(
    bundle: Bundle, files: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = Served(FakeEngine(bundle.path, LETTERS))
    monkeypatch.setattr(use, "Worker", lambda *_, **__: made)
    run("run", "nano-1", "x", "--image", files["a.png"], status=1)
    assert said(capsys)["error"] == "UnsupportedMedia"
