"""Voices to train on and to measure with are apart, and every engine says what it is given."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cloister.errors import SettingError
from cloister.reference import speech, utterances
from cloister.reference.speech import RATE, Engine, Line
from cloister.reference.utterances import Utterance
from cloister.settings import Settings

TEXT = "Can I get a large mocha, please?"
QUICK = (Engine.ESPEAK, Engine.FLITE, Engine.FESTIVAL)


def needed(engine: Engine) -> None:
    try:
        speech.check(engine)
    except SettingError as error:
        pytest.skip(str(error))


def utterance(text: str = TEXT, voice: str = "en-us", **changes: object) -> Utterance:
    values = {"part": "train", "task": "order", "text": text, "target": "{}", "said": text,
              "engine": Engine.ESPEAK, "voice": voice, "rate": 1.0, "pitch": 1.0, **changes}
    return Utterance(**values)


def test_no_voice_is_both_trained_on_and_measured_with() -> None:
    training, never_heard = speech.training_voices(), speech.never_heard_voices()
    assert set(training) == set(never_heard) == set(Engine)
    for engine in Engine:
        assert not set(training[engine]) & set(never_heard[engine])
        assert len(set(training[engine])) == len(training[engine])
    assert sum(map(len, training.values())) > 100
    accents = {voice.partition("+")[0] for voice in training[Engine.ESPEAK]}
    assert accents.isdisjoint(
        voice.partition("+")[0] for voice in never_heard[Engine.ESPEAK])


@pytest.mark.parametrize("engine", QUICK)
def test_an_engine_says_a_line_in_each_kind_of_voice_and_at_each_speed(engine: Engine) -> None:
    needed(engine)
    voices = [speech.training_voices()[engine][0], speech.never_heard_voices()[engine][0]]
    lines = [Line(voice=voice, text=TEXT, rate=rate)
             for voice, rate in itertools.product(voices, (0.8, 1.25))]
    made = speech.speak(engine, lines)
    for sound in made:
        assert sound.dtype == np.int16 and RATE < len(sound) < 6 * RATE
        assert np.abs(sound[:100]).max() < 0.1 * np.abs(sound.astype(int)).max()
    assert len(made[0]) > len(made[1])


@pytest.mark.parametrize("engine", [Engine.ESPEAK, Engine.FLITE])
def test_a_text_that_looks_like_an_option_is_said(engine: Engine) -> None:
    needed(engine)
    voice = speech.training_voices()[engine][0]
    (sound,) = speech.speak(engine, [Line(voice=voice, text="--help me, please")])
    assert len(sound) > RATE / 2


def test_an_engine_that_is_missing_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="install Debian's package flite"):
        speech.speak(Engine.FLITE, [Line(voice="rms", text=TEXT)])


def test_kokoro_without_its_voices_is_refused_with_what_to_unpack(tmp_path: Path) -> None:
    needed(Engine.ESPEAK)
    with pytest.raises(SettingError, match="unpack npm's kokoro-js"):
        speech.check(Engine.KOKORO, tmp_path)


def test_nothing_of_what_is_said_shows_in_a_repr() -> None:
    assert "mocha" not in repr(Line(voice="rms", text=TEXT)) + repr(utterance())


def test_a_recording_is_named_by_engine_voice_settings_and_text() -> None:
    one = utterance()
    assert utterance().file == one.file
    others = [utterance("other"), utterance(voice="en-gb"), utterance(rate=1.1),
              utterance(pitch=0.9), utterance(engine=Engine.FLITE)]
    assert len({one.file, *(each.file for each in others)}) == 6


def test_what_is_planned_is_read_back_and_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    needed(Engine.ESPEAK)
    planned = [utterance(), utterance("A small latte."), utterance()]
    utterances.write_plan(tmp_path, planned)
    assert utterances.read_plan(tmp_path) == planned
    assert utterances.present(tmp_path, planned) == []
    utterances.synthesize(tmp_path, planned[:1])
    made = tmp_path / planned[0].file
    before = made.stat().st_mtime_ns
    utterances.synthesize(tmp_path, planned, workers=2)
    assert made.stat().st_mtime_ns == before
    assert utterances.present(tmp_path, planned) == planned
    sound = utterances.samples(tmp_path, planned[1])
    assert len(sound) == utterances.length(tmp_path, planned[1]) > RATE / 2
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_plan_is_the_same_each_time_and_keeps_voices_and_sentences_apart() -> None:
    data = Settings.from_environment().data
    if data is None:
        pytest.skip("CLOISTER_DATA is not set")
    planned = utterances.plan(data, 400, 100, seed=0)
    assert planned == utterances.plan(data, 400, 100, seed=0)
    train = [each for each in planned if each.part == "train"]
    measure = [each for each in planned if each.part == "measure"]
    assert len(train) == 400 and len(measure) == 16
    assert sum(each.engine is Engine.KOKORO for each in train) == 100
    assert Counter(each.task for each in train) == {"call": 200, "order": 100, "sentence": 100}
    assert {each.task for each in measure} == {"call", "order"}
    assert not {each.words for each in train} & {each.words for each in measure}
    for each in planned:
        voices = (speech.training_voices() if each.part == "train"
                  else speech.never_heard_voices())[each.engine]
        assert set(each.voice.split("+") if each.engine is Engine.KOKORO
                   else [each.voice]) <= set(voices)
        assert each.words and set(each.words) <= set(" 'abcdefghijklmnopqrstuvwxyz")
