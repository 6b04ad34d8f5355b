"""The encoder of sound learns, is stopped and goes on, and is read back as it was written."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cloister.errors import DataError, SettingError, TrainingError
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import MelShape
from cloister.reference import acoustics, ctc, hearing, listener
from cloister.reference.ctc import CtcConfig, CtcModel
from cloister.reference.listener import ListenerSettings
from cloister.reference.speech import RATE, Engine
from cloister.reference.utterances import Utterance

SMALL = CtcConfig(
    encoder=EncoderShape(
        stem=Stem.CONVOLUTIONS_2D, rows=16, positions=100, hidden_size=32, layers=1, heads=2,
        feed_forward=64, halvings=2, width=4),
    mel=MelShape(bins=16))
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


def settings(steps: int, **changes: object) -> ListenerSettings:
    return ListenerSettings(**{"steps": steps, "rows": 4, "warmup": 5, "peak": 1e-2, **changes})


def weights(model: CtcModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_letters_come_back_from_their_symbols_once_repeats_and_blanks_are_dropped() -> None:
    symbols = [0, *ctc.encode("so").tolist(), 0, *ctc.encode("o a").tolist(), 0]
    doubled = torch.tensor([symbol for symbol in symbols for _ in range(2)])
    scores = torch.nn.functional.one_hot(doubled, 1 + len(ctc.LETTERS)).float()
    assert ctc.decode(scores) == "soo a"


def test_an_encoder_that_reads_other_bins_than_the_spectrum_has_is_refused() -> None:
    with pytest.raises(SettingError, match="16 bins"):
        CtcConfig(encoder=SMALL.encoder, mel=MelShape(bins=80))


def test_a_model_gives_the_same_result_for_a_recording_alone_and_in_a_batch() -> None:
    model = CtcModel(SMALL).eval()
    x_BN = torch.randn(3, 4 * SMALL.stride * 5) * 0.1
    with torch.inference_mode():
        together = model(model.spectrum(x_BN))
        alone = torch.cat([model(model.spectrum(row)) for row in x_BN.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.shape == (3, 20, 1 + len(ctc.LETTERS))


def padded(
    speech_N: np.ndarray, length: int, rng: np.random.Generator, *, others: object = ()
) -> np.ndarray:
    """A recording in a quiet place."""
    before = int(rng.integers(length - len(speech_N) + 1))
    return np.pad(speech_N, (before, length - len(speech_N) - before))


@pytest.mark.slow
def test_a_few_recordings_are_learnt_by_heart_wherever_they_stand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acoustics, "record", padded)
    model = CtcModel(SMALL)
    listener.train(model, cache, DATA, settings(300, easy=1.0, peak=3e-2), tmp_path)
    right = 0
    for number, each in enumerate(DATA * 5):
        speech_N, _ = soundfile.read(cache / each.file, dtype="float32")
        heard = padded(speech_N, 2 * RATE, np.random.default_rng(number))
        right += hearing.transcribe(model, heard) == each.said
    assert right >= 16


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(cache: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = CtcModel(SMALL)
    run = listener.train(model, cache, DATA, settings(12), whole)

    def stop(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if "step 5," in note:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        listener.train(CtcModel(SMALL), cache, DATA, settings(12), parts, progress=stop)
    kept = weights(listener.load(parts))
    assert any(not torch.equal(kept[name], value) for name, value in weights(model).items())
    other = CtcModel(SMALL, seed=3)
    assert listener.train(other, cache, DATA, settings(12), parts).losses == run.losses
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(other)[name], value, atol=0, rtol=0)


def test_a_run_does_not_go_on_with_other_data_or_settings(cache: Path, tmp_path: Path) -> None:
    listener.train(CtcModel(SMALL), cache, DATA, settings(2), tmp_path)
    for data, changed in ((DATA[:3], settings(3)), (DATA, settings(3, peak=1e-3))):
        with pytest.raises(SettingError, match="other settings or data"):
            listener.train(CtcModel(SMALL), cache, data, changed, tmp_path)


def test_the_rate_rises_stays_and_falls_with_the_time_that_is_spent() -> None:
    plan = ListenerSettings(minutes=10, warmup=10)
    rates = [plan.rate(listener.Run(losses=[1.0] * steps, seconds=seconds))
             for steps, seconds in ((0, 0), (50, 60), (500, 300), (800, 480), (999, 600))]
    assert rates[0] == pytest.approx(plan.peak / 10)
    assert rates[1] == rates[2] == plan.peak
    assert rates[3] == pytest.approx(plan.peak / 2)
    assert rates[4] == pytest.approx(plan.peak * plan.final)


@pytest.mark.parametrize("changes", [
    {"minutes": 0.0}, {"minutes": float("nan")}, {"steps": 0}, {"rows": 0}, {"decay": 1.5}])
def test_settings_out_of_bounds_are_refused_by_name(changes: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(changes))):
        ListenerSettings(**changes)


def test_what_is_written_is_read_back_and_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    model = CtcModel(SMALL, seed=4)
    listener.write(model, tmp_path)
    read = listener.load(tmp_path)
    assert read.config == model.config
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(read)[name], value, atol=0, rtol=0)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="train it again"):
        listener.load(tmp_path)
    (tmp_path / "model.json").write_text('{"mel": 3}')
    with pytest.raises(TrainingError, match="train it again"):
        listener.load(tmp_path)


def test_a_recording_longer_than_the_longest_is_refused_with_both_lengths() -> None:
    model = CtcModel(SMALL).eval()
    hearing.transcribe(model, np.zeros(SMALL.longest, np.float32))
    with pytest.raises(DataError, match=r"4\.1 s; at most 4\.0 s"):
        hearing.transcribe(model, np.zeros(SMALL.longest + RATE // 10, np.float32))


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
        listener.train(CtcModel(SMALL), tmp_path, [], settings(1), tmp_path)


def test_the_command_without_recordings_ends_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cache", str(tmp_path), "--data", str(tmp_path), "-o", str(tmp_path / "out")]
    assert listener.main(given) == 1
    assert "has no utterances.jsonl" in capsys.readouterr().err.replace("\n", " ")


def test_scores_of_people_count_frames_and_slots_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {}
    for number, drink in enumerate(("latte", "mocha")):
        soundfile.write(tmp_path / f"{number}.flac", np.zeros(RATE), RATE)
        labels[f"{number}.flac"] = {
            "intent": "orderDrink", "slots": {"coffeeDrink": drink, "size": "small"}}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    monkeypatch.setattr(hearing, "transcribe", lambda *_: "a small latte")
    scores = hearing.people(CtcModel(SMALL), tmp_path, trim=True)
    assert scores["frame_exact"] == 0.5 and scores["intent_accuracy"] == 1.0
    assert scores["slot_f1"] == pytest.approx(0.75)
