"""The encoder of sound learns, is stopped and goes on, and is read back as it was written."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cloister.errors import DataError
from cloister.evaluate.transcript import LETTERS
from cloister.model import sense_file
from cloister.model.sense import Sense
from cloister.reference import (
    acoustics,
    checkpoint_path,
    ctc,
    hearing,
    listener,
    reader,
    utterances,
)
from cloister.reference.ctc import CtcModel
from cloister.reference.listener import Recordings
from cloister.reference.speech import RATE, Engine
from cloister.reference.trainer import TrainerSettings, train
from cloister.reference.utterances import Utterance
from cloister.tokenizer import Tokenizer

from .test_ctc import SMALL

FOLDER = checkpoint_path("pro")
TOKENIZER = Tokenizer.from_files(FOLDER / "tokenizer.json", FOLDER / "chat_template.jinja")
LONGEST = SMALL.samples_per_vector * SMALL.encoder.positions
TONES = {"ab": (400.0, 900.0), "ba": (900.0, 400.0), "a": (400.0,), "b": (900.0,)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings in which a letter is a tone."""
    folder = tmp_path_factory.mktemp("cache")
    for each in DATA:
        tones = [np.sin(np.arange(RATE // 3) * (2 * np.pi * hertz / RATE)) * np.hanning(RATE // 3)
                 for hertz in TONES[each.said]]
        soundfile.write(folder / each.file, np.concatenate(tones) * 0.5, RATE)
    return folder


DATA = [Utterance(part="train", task="order", text=text, target="{}", said=text,
                  engine=Engine.ESPEAK, voice="en-us", rate=1.0, pitch=1.0) for text in TONES]


def padded(
    x_BN: torch.Tensor, lengths: Sequence[int], length: int, rng: np.random.Generator, **_: object
) -> torch.Tensor:
    """Recordings in a quiet place."""
    made_BN = torch.zeros(len(x_BN), length)
    for row, (x_N, count) in enumerate(zip(x_BN, lengths, strict=True)):
        before = int(rng.integers(length - count + 1))
        made_BN[row, before:before + count] = x_N[:count]
    return made_BN


@pytest.mark.slow
def test_a_few_recordings_are_learnt_by_heart_wherever_they_stand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acoustics, "record", padded)
    model = CtcModel(SMALL, LETTERS, 4096)
    source = Recordings(cache, DATA, TOKENIZER, SMALL, rows=4)
    train(model, source, TrainerSettings(steps=300, warmup=5, peak=3e-2), tmp_path)
    right = 0
    for number, each in enumerate(DATA * 5):
        speech_N, _ = soundfile.read(cache / each.file, dtype="float32")
        x_1N, rng = torch.from_numpy(speech_N)[None], np.random.default_rng(number)
        heard = padded(x_1N, [len(speech_N)], 2 * RATE, rng)[0].numpy()
        right += hearing.transcribe(model, heard) == each.said
    assert right >= 16


def test_a_pass_has_each_recording_and_a_batch_its_words_and_tokens(cache: Path) -> None:
    source = Recordings(cache, DATA, TOKENIZER, SMALL, rows=2)
    plans = islice(source.plans(), 2)
    assert sorted(row for plan in plans for row in plan) == [0, 1, 2, 3]
    one, again = source.batch([0, 2], 7), source.batch([0, 2], 7)
    assert torch.equal(one.x, again.x) and one.texts == ["ab", "a"]
    assert [TOKENIZER.decode(tokens) for tokens in one.tokens] == ["ab", "a"]
    assert one.x.shape[1] % SMALL.samples_per_vector == 0
    assert not torch.equal(one.x, source.batch([0, 2], 8).x)


def test_batches_from_a_number_on_are_those_of_the_whole_run(cache: Path) -> None:
    source = Recordings(cache, DATA, TOKENIZER, SMALL, rows=2)
    with source.supply(0) as whole, source.supply(3) as rest:
        for one, other in zip(islice(whole, 3, 6), islice(rest, 3), strict=True):
            assert torch.equal(one.x, other.x)


def test_a_recording_longer_than_the_longest_is_refused_with_both_lengths() -> None:
    model = CtcModel(SMALL, LETTERS, 4096).eval()
    hearing.transcribe(model, np.zeros(LONGEST, np.float32))
    with pytest.raises(DataError, match=r"4\.1 s; at most 4\.0 s"):
        hearing.transcribe(model, np.zeros(LONGEST + RATE // 10, np.float32))


def test_silence_is_cut_off_around_what_is_loud_and_nothing_else_is() -> None:
    rng = np.random.default_rng(0)
    recording = rng.standard_normal(5 * RATE).astype(np.float32) * np.float32(1e-4)
    recording[2 * RATE:3 * RATE] += np.sin(np.arange(RATE, dtype=np.float32))
    cut = hearing.trimmed(recording)
    assert len(cut) == pytest.approx(1.5 * RATE, abs=0.05 * RATE)
    np.testing.assert_array_equal(
        cut[len(cut) // 2 - 100:len(cut) // 2], recording[5 * RATE // 2 - 100:5 * RATE // 2])
    np.testing.assert_array_equal(hearing.trimmed(np.zeros(RATE, np.float32)), np.zeros(RATE))


def test_no_recordings_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make them first"):
        Recordings(tmp_path, [], TOKENIZER, SMALL)


def test_the_command_without_recordings_ends_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cache", str(tmp_path), "--data", str(tmp_path), "-o", str(tmp_path / "out")]
    assert listener.main(given) == 1
    assert "has no utterances.jsonl" in capsys.readouterr().err.replace("\n", " ")


def test_a_run_begins_from_an_encoder_and_goes_on_where_its_first_layers_stay(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, encoder=replace(SMALL.encoder, layers=2))
    begun, out = CtcModel(config, LETTERS, 1, seed=5).sense, tmp_path / "out"
    sense_file.save(tmp_path / "ear.safetensors", begun)
    utterances.write_plan(cache, DATA)
    given = ["--cache", str(cache), "--encoder", str(tmp_path / "ear.safetensors"), "--frozen", "1",
             "--minutes", "0.001", "--no-measure", "-o", str(out)]
    assert listener.main(given) == 0
    trained = ctc.load(out).sense.encoder
    for name, value in begun.encoder.state_dict().items():
        stays = name.startswith(("stem.", "layers.0.")) or name == "positions"
        assert torch.equal(trained.state_dict()[name], value) == stays, name
    assert listener.main([*given, "--frozen", "0"]) == 1  # another run
    assert listener.main([*given, "--begin", str(out)]) == 1
    eyes = Sense(reader.config())
    sense_file.save(tmp_path / "ear.safetensors", eyes)
    assert listener.main([*given, "-o", str(tmp_path / "other")]) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    for part in ("other settings or data", "are two beginnings", "is no encoder of sound alone"):
        assert part in said


def test_scores_of_people_count_frames_and_slots_by_value(tmp_path: Path) -> None:
    labels = {}
    for number, drink in enumerate(("latte", "mocha")):
        soundfile.write(tmp_path / f"{number}.flac", np.zeros(RATE), RATE)
        labels[f"{number}.flac"] = {
            "intent": "orderDrink", "slots": {"coffeeDrink": drink, "size": "small"}}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    scores = hearing.people(lambda _: "a small latte", tmp_path, trim=True)
    assert scores["frame_exact"] == 0.5 and scores["intent_accuracy"] == 1.0
    assert scores["slot_f1"] == pytest.approx(0.75)
