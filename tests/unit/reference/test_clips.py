"""What senses learn from and are measured on holds the words that it says it does."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tests.unit.model.test_sense import SHAPE
from tests.unit.reference.test_pictures import FACES, HAND, TEXTS

from cloister.example import Example
from cloister.message import Message
from cloister.model.config import ModelConfig
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import MelShape, PixelScale
from cloister.model.generate import generate
from cloister.model.sense import Sense, SenseConfig
from cloister.model.sense_file import fits
from cloister.model.transformer import Decoder
from cloister.pairs import pair
from cloister.parts import Picture, Recording
from cloister.pieces import MEDIA
from cloister.reference import clips
from cloister.reference.comparison import gain
from cloister.reference.speech import RATE, Engine
from cloister.reference.utterances import Utterance, write_plan
from cloister.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"stem": Stem.CONVOLUTIONS_2D, "hidden_size": 16, "layers": 1, "heads": 2,
                         "feed_forward": 16, "halvings": 2, "width": 2}
EAR = SenseConfig(
    encoder=EncoderShape(rows=16, positions=100, **SIZES), mel=MelShape(bins=16))
EYE = SenseConfig(encoder=EncoderShape(rows=32, positions=128, **SIZES),
                  pixels=PixelScale(mean=(1.0,), deviation=(0.5,)))
FORMATS = clips.formats(EYE, EAR)
PRIVATE = [Example(task="redact", input=f"call Ana on {number}", target=f"call [NAME] on {number}")
           for number in range(5)]
CALLS = [Example(task="call", input="play jazz", target='{"name": "Play", "arguments": {}}')]
LONG = Example(task="redact", input="x " * 40 + "x", target="none of it")


def call(number: object) -> str:
    return json.dumps({"name": "Play", "arguments": {"number": str(number)}})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    rng, said = np.random.default_rng(0), []
    for number in range(40):
        said.append(Utterance(
            part="measure" if number % 4 == 3 else "train", task="call" if number % 2 else "order",
            text=f"Play {number}", target=call(number), said=f"play {number}",
            engine=Engine.ESPEAK, voice="en-us", rate=1.0, pitch=1.0))
        sound_N = rng.normal(0, 0.1, RATE // 2 + 1000 * number).astype(np.float32)
        soundfile.write(folder / said[-1].file, sound_N, RATE)
    write_plan(folder, said)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_files(
        tokenizer_dir / "tokenizer.json", tokenizer_dir / "chat_template.jinja",
        SimpleNamespace(special_tokens=None, bos=None, eos=(), media=FORMATS))


def mixture() -> Any:
    held_out = {"redact": [*PRIVATE, LONG], "call": CALLS}
    return SimpleNamespace(
        examples=lambda passes, seed: iter([*PRIVATE, LONG, *CALLS]), texts=lambda seed: TEXTS,
        held_out=held_out, held_out_texts=TEXTS)


def recording(samples: int) -> Recording:
    return Recording(data=np.zeros(samples, np.float32).tobytes(), rate=RATE)


def test_a_tier_takes_what_the_encoders_read() -> None:
    assert FORMATS.picture is not None and FORMATS.recording is not None
    assert fits(EYE, FORMATS.picture) and fits(EAR, FORMATS.recording)
    assert FORMATS.recording.most == 4 * RATE
    assert FORMATS.picture.tokens == 128


def test_a_clip_stands_in_the_prompt_where_the_words_stood(tokenizer: Tokenizer) -> None:
    example = Example(task="call", input="play the fox", target="[1]")
    made = clips.clip(tokenizer, example, torch.zeros(3, 16))
    assert pair(tokenizer, example) == (
        [*made.before, *made.words, *made.after], list(made.answer))
    assert tokenizer.decode(made.words) == "play the fox"
    heard = replace(example, turns=(
        Message(role="system", content="call"),
        Message(role="user", content=(recording(1280),))))
    assert pair(tokenizer, heard)[0] == [*made.before, MEDIA, MEDIA, *made.after]
    assert clips.clip(tokenizer, heard, torch.zeros(3, 16)).words == made.words
    unknown = clips.clip(tokenizer, replace(heard, input=""), torch.zeros(3, 16))
    assert unknown == replace(made, x_ND=unknown.x_ND, words=())


def test_recordings_of_a_batch_have_one_length_and_are_the_same_each_time(cache: Path) -> None:
    form = FORMATS.recording
    assert form is not None
    first, again = (list(clips.heard(cache, 30, form, 1)) for _ in range(2))
    assert sorted(len(examples) for examples, _ in first) == [14, 16]  # none to measure with
    for (examples, x_B1N), (same, y_B1N) in zip(first, again, strict=True):
        assert examples == same and torch.equal(x_B1N, y_B1N)
        assert x_B1N.shape[0] == len(examples) and x_B1N.shape[1] == 1
        assert x_B1N.shape[2] % form.multiple == 0 and x_B1N.shape[2] <= form.most
        assert (x_B1N.abs().amax((1, 2)) > 0.01).all()
        assert all(each.target == call(each.input.split()[1]) for each in examples)


def test_pictures_to_learn_from_are_whole_lines_with_their_answers() -> None:
    batches = list(clips.seen(mixture(), FACES, 64, 3))
    found = [each for examples, _ in batches for each in examples]
    assert {each.task for each in found} == {"read", "redact", "call"}
    assert LONG.input not in {each.input for each in found}
    for each in found:
        if each.task == "redact":
            assert each in PRIVATE
        elif each.task == "read":
            assert each.target == each.input
    for examples, x_B3RW in batches:
        assert x_B3RW.shape == (len(examples), 3, 32, 512) and x_B3RW.dtype == torch.uint8


def test_what_is_measured_is_shown_as_a_program_takes_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "_MEASURED", 3)
    assert FORMATS.recording is not None
    spoken = clips.spoken(cache, FORMATS.recording)
    assert len(spoken) == 10 and {each.task for each in spoken} == {"call"}
    pictures = clips.shown(mixture(), [*FACES, HAND])
    assert set(pictures) == {"lines, clean", "lines, half worn", "lines, worn",
                             *(f"{task} by camera, {name}" for task in ("redact", "call")
                               for name in clips.CAMERA)}
    for each in [*spoken, *(row for rows in pictures.values() for row in rows)]:
        (part,) = each.messages[-1].media
        assert isinstance(part, Picture | Recording)
        assert FORMATS.vectors(part) > 0
    redacted = clips.written(pictures["redact by camera, printed"])
    assert all(each in PRIVATE and each.messages[-1].text == each.input for each in redacted)


def test_batches_and_single_recordings_are_encoded_alike(
    cache: Path, tokenizer: Tokenizer
) -> None:
    assert FORMATS.recording is not None
    ear = Sense(EAR)
    ear.encoder.initialize(1)
    (examples, x_B1N), *_ = clips.heard(cache, 30, FORMATS.recording, 1)
    alone = [replace(each, turns=(Message(role="user", content=(
        Recording(data=x_1N.numpy().tobytes(), rate=RATE),)),))
        for each, x_1N in zip(examples, x_B1N, strict=True)]
    together = clips.encoded([(examples, x_B1N)], ear.eval(), tokenizer)
    apart = clips.encoded(clips.single(alone, FORMATS), ear, tokenizer)
    for one, two in zip(together, apart, strict=True):
        assert torch.allclose(one.x_ND, two.x_ND, atol=1e-4)
        assert (one.words, one.answer) == (two.words, two.answer)


def test_a_teacher_answers_the_words_and_is_not_followed_without_end(
    tokenizer: Tokenizer
) -> None:
    decoder = Decoder(ModelConfig(shape=replace(SHAPE, context=128)))
    decoder.initialize(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    rng = random.Random(0)
    given = [clips.clip(tokenizer, Example(
        task="call", input=" ".join(rng.choices(["play", "the", "fox", "what"], k=3)),
        target="[1]"), torch.zeros(1, 16)) for _ in range(12)]
    limit = 2 * max(len(each.answer) for each in given) + 16
    said = generate(decoder, [[*each.before, *each.words, *each.after] for each in given],
                    end=(), limit=limit)
    end = said[0][2]  # one that some answers have, and others not
    wanted = [(*ids[:ids.index(end)], end) for ids in said if end in ids]
    assert 0 < len(wanted) <= 12
    assert [each.answer for each in clips.answered(given, decoder, end)] == wanted


def test_the_gain_is_that_of_the_same_examples() -> None:
    before = [[True, False, False, False], [True, False, True, False]]
    after = [[True, True, False, False], [True, True, True, True]]
    found = gain(before, after)
    assert found["gain"] == pytest.approx(0.375)
    assert found["before"] == [0.25, 0.5] and found["after"] == [0.5, 1.0]
    assert found["error_of_runs"] == pytest.approx(0.125)
    assert found["error_of_examples"] == pytest.approx(np.std([0, 1, 0, 0.5], ddof=1) / 2)
