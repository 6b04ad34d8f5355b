"""Texts, pictures and recordings are asked together, decoded first, counted and kept."""

from __future__ import annotations

import base64
import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.unit.runtime.conftest import LETTERS, LINES, MEDIA, FakeEngine, make_media_bundle
from tests.unit.runtime.served import Served, picture, png, recording

from cloister.bundle import Bundle
from cloister.errors import (
    ContextExceeded,
    EmptyPrompt,
    MediaTooLarge,
    MediaUnreadable,
    SettingError,
    UnsupportedMedia,
)
from cloister.message import Message
from cloister.parts import Audio, Image, Picture, Recording
from cloister.runtime import conversation, protocol
from cloister.runtime.chat import Ask
from cloister.runtime.core import MediaPosition, Position
from cloister.runtime.generate import Decoding, generate
from cloister.runtime.prompt import Count
from cloister.runtime.sampling import Sampler
from cloister.runtime.session import Session
from cloister.vault.namespace import Kind, Namespace
from cloister.vault.store import Vault

RNG = np.random.default_rng(7)


def ask(session: Any, prompt: Any, n: int = 4, **options: Any) -> list[int]:
    return [token.id for token in session.stream(prompt, max_tokens=n, **options)]


@pytest.fixture
def seeing(media_bundle: Bundle) -> FakeEngine:
    return FakeEngine(media_bundle.path, LETTERS)


def test_parts_are_read_where_they_stand_and_told_by_kind(seeing: FakeEngine) -> None:
    session = Session(seeing)
    said = ask(session, ["the ", picture(), "fox", recording()])
    tokenizer = seeing.tokenizer
    written = ["<|user|>", "the <", picture(), ">fox", recording(), "<|end|>", "<|assistant|>"]
    positions: list[Position] = []
    for part in written:
        if not isinstance(part, str):
            positions += seeing.media(part)
        elif part.startswith("<|"):
            positions.append(tokenizer.id_of(part))  # type: ignore[arg-type]
        else:
            positions += tokenizer.encode(part)
    assert seeing.cached[:len(positions)] == positions
    fresh = FakeEngine(seeing.bundle.path, LETTERS)
    wanted = [choice.id for choice in generate(
        fresh, positions, Decoding(sampler=Sampler(Ask.of("x").sampling), limit=4))]
    assert said == wanted
    stats = session.stats
    assert (stats.prompt_tokens, stats.picture_tokens, stats.recording_tokens) == (
        len(positions), 12, 4)
    assert 0 < stats.encode_s <= stats.ttft_s
    assert session.messages[0].content == ("the ", picture(), "fox", recording())


def test_a_later_turn_encodes_and_reads_only_what_is_new(seeing: FakeEngine) -> None:
    session = Session(seeing)
    ask(session, [picture(1), "the fox"])
    ask(session, [recording(), "and", picture(2)])
    assert seeing.program.encoded == ["picture", "recording", "picture"]
    first = session.messages
    seeing.program.calls.clear()
    ask(session, "the dog", 1)
    assert seeing.program.calls[0][0] > 40
    assert seeing.program.encoded == ["picture", "recording", "picture"]
    other = Session(FakeEngine(seeing.bundle.path, LETTERS), messages=first)
    assert ask(other, "the dog", 1) == ask(
        Session(FakeEngine(seeing.bundle.path, LETTERS), messages=first), "the dog", 1)
    assert other.messages[:4] == first


def test_a_file_or_an_array_is_decoded_before_it_is_read(seeing: FakeEngine) -> None:
    pixels = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    expected = Picture(data=pixels.transpose(2, 0, 1).tobytes(), height=4, width=6)
    session = Session(seeing)
    for given in (Image.of(pixels), Image(data=png(pixels, Comment="a place"))):
        ask(session, [given, "the fox"], 1)
        assert session.messages[-2].content == (expected, "the fox")
    ask(session, Audio.of(np.full(16000, 0.25, np.float32), rate=8000), 1)
    heard, = session.messages[-2].content
    assert isinstance(heard, Recording)
    assert heard.samples == 200
    before = Session(seeing, messages=[Message(role="user", content=[Image.of(pixels)])])
    assert before.messages[0].content == (expected,)


@pytest.mark.parametrize(("prompt", "error", "match"), [
    ([Image(data=b"%PDF-1.4 secret"), "x"], MediaUnreadable, "no PNG"),
    ([recording(401), "x"], MediaTooLarge, "4.0 s"),
    ([Recording(data=bytes(8), rate=50)], UnsupportedMedia, "others"),
    ([Picture(data=bytes(12), height=2, width=2)], UnsupportedMedia, "others"),
    ([], EmptyPrompt, "no message"),
    ([""], EmptyPrompt, "empty"),
    ([Message(role="user", content="x"), picture()], SettingError, "messages among the parts"),
    (["x", Message(role="user", content="x")], SettingError, "messages among the parts"),
    ([Path("x.png")], SettingError, r"Image\.open"),
    ([5], SettingError, r"Image\.open"),
    ([picture(shade) for shade in range(50)], ContextExceeded,
     r"\d+ tokens, 600 of them of 50 pictures, and the context holds 512"),
    ([picture(), *[recording(400)] * 13, "x"], ContextExceeded,
     r"12 of them of 1 picture, 520 of them of 13 recordings, and"),
])
def test_what_cannot_be_asked_is_refused_by_name_and_nothing_changes(
    seeing: FakeEngine, prompt: Any, error: type[Exception], match: str
) -> None:
    session = Session(seeing)
    ask(session, "the fox", 2)
    before, cached = session.messages, seeing.cached
    with pytest.raises(error, match=match) as caught:
        ask(session, prompt)
    assert "secret" not in str(caught.value)
    assert session.messages == before
    assert seeing.cached == cached
    assert ask(session, [picture(), "the dog"])


@pytest.mark.parametrize("part", [picture(), recording(), Image(data=b"x"), Audio(data=b"x")])
def test_a_bundle_of_texts_refuses_media_and_the_conversation_goes_on(
    engine: FakeEngine, part: Any
) -> None:
    session = Session(engine)
    with pytest.raises(UnsupportedMedia, match=r"text only|takes no"):
        ask(session, [part, "x"])
    assert session.messages == []
    assert ask(session, "the fox", 2)


def test_a_url_is_text_and_nothing_is_fetched(seeing: FakeEngine) -> None:
    session = Session(seeing)
    ask(session, ["https://example.invalid/a.png", picture()], 1)
    assert seeing.program.encoded == ["picture"]
    with pytest.raises(MediaUnreadable, match="URL"):
        Image.open("https://example.invalid/a.png")


def test_tokens_are_counted_by_kind_without_encoding(seeing: FakeEngine) -> None:
    session = Session(seeing)
    parts = [picture(), "fox", recording(), picture(2)]
    count = session.count(parts)
    assert (count.picture, count.pictures, count.recording, count.recordings) == (24, 2, 4, 1)
    assert seeing.program.encoded == []
    ask(session, parts, 2)
    assert session.stats.prompt_tokens == count.total
    assert session.count("x").total > count.total
    assert session.count("x", tools=[{"name": "f"}]).picture == 24
    too_many = session.count([picture()] * 60)
    assert too_many.picture == 62 * 12


def test_vectors_that_the_encoder_leaves_out_are_not_counted(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    fewer = msgspec.structs.replace(
        MEDIA, picture=msgspec.structs.replace(MEDIA.picture, fewer=True))
    engine = FakeEngine(make_media_bundle(
        tmp_path / "fewer.cloister", tokenizer_dir, fewer).path, LETTERS)
    session = Session(engine)
    count = session.count([picture(4), recording(), "fox"])
    assert (count.picture, count.recording) == (5, 4)
    ask(session, [picture(4), recording(), "fox"])
    assert session.stats.prompt_tokens == count.total == len(engine.cached) - 3
    assert session.stats.picture_tokens == 5
    assert 0 < session.stats.encode_s < session.stats.ttft_s
    assert ask(session, [picture(0)] * 40 + ["fox"])  # 480, were they all there


def test_a_note_that_is_kept_is_read_with_a_line_break_between_its_lines(
    tmp_path: Path, tokenizer_dir: Path, vault: Vault
) -> None:
    path = make_media_bundle(tmp_path / "lines.cloister", tokenizer_dir, LINES).path
    note = Picture(
        data=picture(4).data + picture(2).data, height=4, width=6, lines=2)
    session = Session(FakeEngine(path, LETTERS), vault=vault, name="note")
    alone = session.count([picture(4), "fox"])
    count = session.count([note, "fox"])
    assert (count.picture, count.pictures) == (5 + 3, 1)
    assert count.text == alone.text + len(session.engine.tokenizer.encode("\n"))
    ask(session, [note, "fox"])
    session.close()
    again = Session(FakeEngine(path, LETTERS), vault=vault, name="note")
    assert again.messages[0].media == (note,)
    assert again.count("more").picture == 8


def test_an_answer_is_given_again_for_the_same_picture_only(
    seeing: FakeEngine, vault: Vault
) -> None:
    def again(shade: int) -> tuple[list[int], float]:
        session = Session(seeing, vault=vault, cached=True)
        return ask(session, [picture(shade), "the fox"]), session.stats.encode_s

    first, took_s = again(1)
    assert took_s > 0
    seeing.program.calls.clear()
    assert again(1) == (first, 0)
    assert seeing.program.calls == []
    again(2)
    assert seeing.program.calls


# Through a worker.


@pytest.fixture
def served(seeing: FakeEngine) -> Served:
    return Served(seeing)


def test_a_worker_answers_as_a_session_does_and_never_sees_the_file(
    served: Served, media_bundle: Bundle
) -> None:
    pixels = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    file = png(pixels, Place="52.5 N 13.4 E, a most private place")
    session, alone = served.session(), Session(FakeEngine(media_bundle.path, LETTERS))
    for prompt in ([Image(data=file), "the fox"], "and the dog", [recording(), picture()]):
        assert session.count(prompt) == alone.count(prompt)
        assert ask(session, prompt) == ask(alone, prompt)
        assert session.messages == alone.messages
    assert session.stats.picture_tokens == alone.stats.picture_tokens == 24
    sent = b"".join(served.lines)
    assert base64.b64encode(pixels.transpose(2, 0, 1).tobytes()) in sent  # so it would be found
    for part in (file[8:60], file[-60:], b"52.5 N 13.4 E, a most private place"):
        for shift in range(3):
            assert base64.b64encode(bytes(shift) + part)[4:-4] not in sent


def test_a_worker_refuses_what_is_not_decoded_by_name(served: Served) -> None:
    session = served.session()
    undecoded = (Message(role="user", content=(Image(data=b"x"), "y")),)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for request in (
        protocol.Question(id=90, chat=session._chat, ask=Ask(messages=undecoded)),
        protocol.Count(id=91, chat=session._chat, ask=Ask(messages=undecoded)),
        protocol.Begin(id=92, chat=92, messages=undecoded),
    ):
        served.ask(request, events)
        failed = events.get_nowait()
        assert (failed.kind, failed.id) == ("UnsupportedMedia", request.id)
        assert "read" in failed.message
    assert ask(session, "the fox", 2)


# In the vault.


Kept = Callable[..., tuple[FakeEngine, Session]]


@pytest.fixture
def kept(media_bundle: Bundle, vault: Vault) -> Kept:
    """A conversation of that name with a new engine, as another process would have it."""
    def begin(name: str = "seen") -> tuple[FakeEngine, Session]:
        engine = FakeEngine(media_bundle.path, LETTERS)
        return engine, Session(engine, vault=vault, name=name)

    return begin


def test_a_conversation_goes_on_with_its_pictures_whether_its_state_is_kept_or_not(
    kept: Kept, space: Namespace, media_bundle: Bundle
) -> None:
    _, session = kept()
    ask(session, [picture(), "the fox", recording()])
    ask(session, [picture(), "again"])
    said = session.messages
    whole = Session(FakeEngine(media_bundle.path, LETTERS), messages=said)
    wanted = ask(whole, "the dog", 3)
    engine, resumed = kept()
    assert resumed.messages == said
    assert resumed.restored_tokens > 30
    assert ask(resumed, "the dog", 3) == wanted
    assert engine.program.encoded == []
    space.shred(Kind.PREFIX)
    engine, resumed = kept()
    assert resumed.restored_tokens == 0
    assert resumed.messages[:-2] == said
    ask(resumed, "and", 1)
    assert sorted(engine.program.encoded) == ["picture", "picture", "recording"]


def test_a_picture_is_kept_once_and_goes_with_the_conversation(
    kept: Kept, space: Namespace
) -> None:
    def pixels() -> int:
        return sum(content.count(picture().data) for content in space.everything(model))

    engine, session = kept()
    model = bytes.fromhex(engine.model_id)
    for _ in range(3):
        ask(session, [picture(), "the fox"], 2)
    assert pixels() == 1
    _, session = kept()
    ask(session, [picture(), "more"], 2)
    assert pixels() == 1
    list(session.answer(replace(Ask.of("other", max_tokens=2), after=0)))  # goes back
    assert pixels() == 0
    ask(session, [picture()], 2)
    session.forget()
    assert space.sizes() == {}


def test_what_is_exported_says_what_a_picture_is_and_has_no_bytes(
    kept: Kept, space: Namespace
) -> None:
    _, session = kept()
    wide = Picture(data=bytes(216), height=4, width=6, grid=(1, 2))
    ask(session, ["look:", picture(), recording(), "so?"], 2)
    session.close()
    found = conversation.export(space, "seen")
    assert found["messages"][0]["content"] == (
        "look:\n[picture 6 x 4]\n[recording 0.3 s]\nso?")
    assert Message(role="user", content=[wide]).shown == "[picture 12 x 4]"
    assert [each.name for each in conversation.listed(space)] == ["seen"]


def test_no_pixel_or_sample_lies_open_in_any_file(tmp_path: Path, tokenizer_dir: Path) -> None:
    from cloister.vault.keys import Keyholder

    bundle = make_media_bundle(tmp_path / "media.cloister", tokenizer_dir, MEDIA)
    seen = Picture(data=RNG.bytes(72), height=4, width=6)
    heard = Recording(
        data=RNG.uniform(-1, 1, 200).astype(np.float32).tobytes(), rate=100)
    forms = [
        form for data in (seen.data, heard.data) for middle in [data[8:56]]
        for form in (middle, middle.hex().encode(), *(
            base64.b64encode(bytes(shift) + middle)[4:-4] for shift in range(3)))]

    def found(root: Path) -> int:
        files = [path.read_bytes() for path in root.rglob("*") if path.is_file()]
        return sum(form in file for form in forms for file in files)

    home = tmp_path / "home"
    home.mkdir()
    with Vault.create(home / "vault", Keyholder(keyfile=home / "key")) as vault:
        for options in ({"name": "seen"}, {"cached": True}):
            session = Session(FakeEngine(bundle.path, LETTERS), vault=vault, **options)  # type: ignore[arg-type]
            ask(session, ["the fox", seen, heard])
            session.close()
        assert found(home) == 0
        control = tmp_path / "control"
        control.mkdir()
        for number, content in enumerate(vault.namespace().everything(
                bytes.fromhex(FakeEngine(bundle.path).model_id))):
            (control / str(number)).write_bytes(content)
    assert found(home) == 0
    assert found(control) >= 2


def test_a_count_has_its_sum() -> None:
    assert Count(text=3, picture=4, recording=5).total == 12


def test_no_content_is_in_a_repr(seeing: FakeEngine) -> None:
    question = Ask.of([picture(), "secret"])
    assert "secret" not in repr(question)
    assert "x01" not in repr(question) + repr(question.messages[0].content[0])
    assert "MediaPosition" in repr(seeing.media(picture())[0])
    assert isinstance(seeing.media(picture())[0], MediaPosition)
