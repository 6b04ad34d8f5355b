"""Pictures and recordings are positions: encoded when they are read, once, and put back."""

from __future__ import annotations

import array
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from tests.unit.runtime.conftest import LINES, MEDIA, VOCABULARY, FakeEngine, make_media_bundle

from cloister.bundle import Bundle
from cloister.errors import MediaTooLarge, NotEnoughMemory, UnsupportedMedia
from cloister.manifest import Encoder
from cloister.parts import Picture, Recording
from cloister.pieces import MEDIA as MEDIA_ID
from cloister.pieces import MediaFormats
from cloister.runtime.chat import Sampling
from cloister.runtime.core import Core, MediaPosition, Position, Rows
from cloister.runtime.generate import Decoding, generate, score
from cloister.runtime.prefix import PrefixCache
from cloister.runtime.program import FakeProgram
from cloister.runtime.sampling import Sampler
from cloister.vault.namespace import Kind, Namespace

CHUNK = 8
IDS = list(range(10, 40))
BOTH_WAYS = msgspec.structs.replace(
    MEDIA, picture=msgspec.structs.replace(MEDIA.picture, both_ways=True))


def picture(shade: int, **changes: int) -> Picture:
    size = {"height": 4, "width": 6, **changes}
    return Picture(data=bytes([shade]) * 3 * size["height"] * size["width"], **size)


def recording(samples: int, rate: int = 100) -> Recording:
    return Recording(data=array.array("f", [0.5] * samples).tobytes(), rate=rate)


@pytest.fixture
def engine(media_bundle: Bundle) -> FakeEngine:
    return FakeEngine(media_bundle.path)


@pytest.fixture
def both_ways(tmp_path: Path, tokenizer_dir: Path) -> FakeEngine:
    bundle = make_media_bundle(tmp_path / "media.cloister", tokenizer_dir, BOTH_WAYS)
    return FakeEngine(bundle.path)


def alone(positions: list[Position], media: MediaFormats = MEDIA) -> torch.Tensor:
    """Logits after `positions`, read by a program that has read nothing."""
    core = Core(FakeProgram(VOCABULARY, 512, media=media), name="tiny", context=512, chunk=CHUNK,
                reads_media=True)
    return core.extend(positions)


def test_texts_pictures_and_recordings_are_read_in_their_order(engine: FakeEngine) -> None:
    shown = [*IDS[:5], *engine.media(picture(1)), *IDS[5:7], *engine.media(recording(35))]
    assert len(shown) == 5 + 12 + 2 + 4  # 35 samples are filled up to 40
    assert engine.program.encoded == []  # before they are read
    engine.extend(shown)
    assert engine.program.encoded == ["picture", "recording"]
    assert engine.program.calls == [(0, 5), (5, 8), (13, 4), (17, 2), (19, 4)]
    assert engine.cached == shown
    engine.extend([*shown, 9])
    assert engine.program.calls[5:] == [(23, 1)]
    assert engine.program.encoded == ["picture", "recording"]


def test_what_is_read_in_parts_gives_what_one_reading_gives(engine: FakeEngine) -> None:
    rng = random.Random(4)
    shown: list[Position] = [
        *IDS[:9], *engine.media(picture(1)), *engine.media(recording(60)), *IDS]
    expected = alone(shown)
    for _ in range(50):
        engine.truncate(rng.randint(0, len(shown)))
        engine.extend(shown[:rng.randint(1, len(shown))])
        assert torch.equal(engine.extend(shown), expected)


def test_equal_content_is_equal_and_all_that_tells_two_apart_does(engine: FakeEngine) -> None:
    assert engine.media(picture(1)) == engine.media(picture(1))
    names = {engine.media(part)[0].digest for part in (
        picture(1), picture(2), recording(40), recording(41))}
    assert len(names) == 4


def test_without_a_vault_digests_are_of_one_engine_only(media_bundle: Bundle) -> None:
    one, two = FakeEngine(media_bundle.path), FakeEngine(media_bundle.path)
    assert one.media(picture(1)) != two.media(picture(1))


def test_a_picture_that_attends_both_ways_is_read_in_one_call_and_whole(
    both_ways: FakeEngine
) -> None:
    shown: list[Position] = [
        *IDS[:5], *both_ways.media(picture(1)), *both_ways.media(picture(2)),
        *both_ways.media(recording(100)), 7]
    expected = alone(shown, BOTH_WAYS)
    both_ways.program.calls.clear()
    assert torch.equal(both_ways.extend(shown), expected)
    assert both_ways.program.calls == [(0, 5), (5, 12), (17, 12), (29, 8), (37, 2), (39, 1)]
    both_ways.truncate(20)  # within the second picture
    assert both_ways.common(shown) == 17
    both_ways.program.calls.clear()
    assert torch.equal(both_ways.extend(shown), expected)
    assert both_ways.program.calls[0] == (17, 12)
    both_ways.extend(shown[:29])  # ends with it: its last vector is not read alone
    assert torch.equal(both_ways.extend(shown), expected)
    with pytest.raises(UnsupportedMedia, match="whole"):
        both_ways.extend(shown[:20])


def test_an_answer_after_a_picture_can_be_stopped_between_calls(both_ways: FakeEngine) -> None:
    shown: list[Position] = [*IDS[:5], *both_ways.media(picture(1)), *IDS[:3]]
    stops = iter([False, True])
    decoding = Decoding(sampler=Sampler(Sampling()), limit=3)
    assert list(generate(both_ways, shown, decoding, stopped=lambda: next(stops))) == []
    assert both_ways.cached == shown[:5]
    answer = [choice.id for choice in generate(both_ways, shown, decoding)]
    assert int(alone(shown, BOTH_WAYS).argmax()) == answer[0]


def test_a_draft_after_a_picture_changes_no_token(engine: FakeEngine) -> None:
    class Guess:
        def propose(self, *_: object) -> list[int]:
            return [5, 6]

        def took(self, *_: object) -> None:
            pass

        def judged(self, *, right: bool) -> None:
            pass

    shown: list[Position] = [*IDS[:5], *engine.media(picture(1))]  # ends with it
    sampler = Sampler(Sampling())
    plain = [choice.id for choice in generate(engine, shown, Decoding(sampler=sampler, limit=4))]
    drafted = Decoding(sampler=sampler, limit=4, drafter=Guess())
    assert [choice.id for choice in generate(engine, shown, drafted)] == plain


def test_text_after_a_picture_has_likelihoods_and_the_picture_has_none(
    engine: FakeEngine
) -> None:
    shown: list[Position] = [*IDS[:5], *engine.media(picture(1)), *IDS]
    for first in (17, 20):
        rows = torch.cat(list(score(engine, shown, first)))
        assert len(rows) == len(shown) - first
        for number in range(first, len(shown)):
            assert torch.equal(rows[number - first], alone(shown[:number + 1])[0])
        engine.truncate(3)
    with pytest.raises(UnsupportedMedia, match="likelihoods"):
        engine.extend(shown, Rows.ALL)


def test_an_encoder_that_leaves_out_what_says_nothing_gives_fewer_positions(
    tmp_path: Path, tokenizer_dir: Path, space: Namespace
) -> None:
    fewer = msgspec.structs.replace(
        MEDIA, picture=msgspec.structs.replace(MEDIA.picture, fewer=True))
    path = make_media_bundle(tmp_path / "fewer.cloister", tokenizer_dir, fewer).path
    engine = FakeEngine(path)
    kept = PrefixCache(engine, space)
    ids = [1, *[MEDIA_ID] * 12, 2, *[MEDIA_ID] * 4, 3]
    shown = engine.positions(ids, [picture(2), recording(40)], kept)
    assert shown == [
        1, *engine.media(picture(2), kept), 2, *engine.media(recording(40), kept), 3]
    assert len(shown) == 3 + 3 + 4
    assert engine.program.encoded == ["picture"]  # once, to know how many there are
    engine.extend(shown)
    kept.keep(shown)
    other = FakeEngine(path)
    again = other.positions(ids, [picture(2), recording(40)], PrefixCache(other, space))
    assert again == shown
    other.extend(again)
    assert other.program.encoded == []


def test_each_line_of_a_note_has_as_many_positions_as_its_encoder_gives(
    tmp_path: Path, tokenizer_dir: Path, space: Namespace
) -> None:
    path = make_media_bundle(tmp_path / "lines.cloister", tokenizer_dir, LINES).path
    engine = FakeEngine(path)
    kept = PrefixCache(engine, space)
    note = Picture(
        data=b"".join(picture(shade).data for shade in (2, 4, 0)), height=4, width=6, lines=3)
    ids = [1, *[MEDIA_ID] * 12, 2, *[MEDIA_ID] * 12, 2, *[MEDIA_ID] * 12, 3]
    shown = engine.positions(ids, [note], kept)
    each = [engine.media(picture(shade), kept) for shade in (2, 4, 0)]
    assert [*map(len, each)] == [3, 5, 1]
    assert shown == [1, *each[0], 2, *each[1], 2, *each[2], 3]
    assert engine.media(note, kept) == [*each[0], *each[1], *each[2]]
    assert engine.program.encoded == ["picture"] * 3
    expected = engine.extend(shown)
    kept.keep(shown)
    other = FakeEngine(path)
    again = other.positions(ids, [note], PrefixCache(other, space))
    assert again == shown
    assert torch.equal(other.extend(again), expected)
    assert other.program.encoded == []  # put back line by line


def test_what_the_bundle_does_not_take_is_refused_by_name(
    engine: FakeEngine, bundle: Bundle, tmp_path: Path, tokenizer_dir: Path
) -> None:
    text, deaf = FakeEngine(bundle.path), FakeEngine(make_media_bundle(
        tmp_path / "deaf.cloister", tokenizer_dir,
        msgspec.structs.replace(MEDIA, recording=None)).path)
    refused: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: text.media(picture(1)), UnsupportedMedia, "reads text only"),
        (lambda: deaf.media(recording(20)), UnsupportedMedia, "takes no recordings"),
        (lambda: engine.media(picture(1, height=5)), UnsupportedMedia, "picture was decoded for"),
        (lambda: engine.media(recording(20, rate=50)), UnsupportedMedia, "recording was decoded"),
        (lambda: engine.media(recording(401)), MediaTooLarge, r"4\.0 s is over the 4\.0 s"),
    ]
    for call, error, words in refused:
        with pytest.raises(error, match=words):
            call()


def test_an_encoder_is_given_memory_when_it_is_first_used(
    media_bundle: Bundle, tmp_path: Path
) -> None:
    engine = FakeEngine(media_bundle.path, available_bytes=100_000_000)
    engine._entry = msgspec.structs.replace(engine._entry, encoders=(
        Encoder(method="audio_encoder", weight_bytes=150_000_000, arena_bytes=0),
        Encoder(method="vision_encoder", weight_bytes=10_000, arena_bytes=0)))
    engine.extend([*engine.media(picture(1)), 5])
    with pytest.raises(NotEnoughMemory, match=r"0\.15 GB"):
        engine.extend(engine.media(recording(20)))


def test_a_picture_seen_before_is_put_back_and_not_encoded(
    media_bundle: Bundle, space: Namespace
) -> None:
    engine = FakeEngine(media_bundle.path)
    kept = PrefixCache(engine, space)
    first = engine.media(picture(1), kept)
    engine.extend([*first, 5])
    kept.keep([*first, 5])
    other = FakeEngine(media_bundle.path)
    again = other.media(picture(1), PrefixCache(other, space))
    assert again == first
    other.extend([9, *again])  # nothing else that was kept begins like this
    assert other.program.encoded == []
    assert torch.equal(again[0].vectors[0:12], first[0].vectors[0:12])  # type: ignore[index]
    elsewhere = space.vault.namespace("other")
    apart = other.media(picture(1), PrefixCache(other, elsewhere))
    assert apart != first
    other.extend([8, *apart])
    assert other.program.encoded == ["picture"]


def test_a_forgotten_conversation_takes_its_pictures_along(
    media_bundle: Bundle, space: Namespace
) -> None:
    engine = FakeEngine(media_bundle.path)
    kept = PrefixCache(engine, space)
    shown: list[Position] = [*engine.media(picture(1), kept), 5]
    engine.extend(shown)
    kept.keep(shown, b"seen")
    assert kept.fetch_media(shown[0].digest) is not None  # type: ignore[union-attr]
    for name in kept.names(shown, b"seen"):
        space.forget(Kind.PREFIX, name)
    assert space.sizes() == {}


def test_a_media_position_holds_no_content_in_its_repr(engine: FakeEngine) -> None:
    (first, *_) = engine.media(picture(1))
    assert "vectors" not in repr(first)
    assert replace(first, place=3) == MediaPosition(first.digest, 3)
