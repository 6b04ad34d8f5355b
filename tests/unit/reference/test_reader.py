"""The reader of lines learns, goes on where it was stopped, and is kept as it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister.distill.optimizer import Optimizer
from cloister.distill.schedule import Schedule
from cloister.errors import SettingError, TrainingError
from cloister.model.encoder import EncoderShape, Stem
from cloister.reference import characters, reading
from cloister.reference.batches import stacked
from cloister.reference.characters import CharacterModel, decode, encode
from cloister.reference.pictures import Camera, Picture
from cloister.reference.reader import ReaderSettings, train

from .test_pictures import FACES, TEXTS

SMALL = replace(characters.default(), encoder=EncoderShape(
    stem=Stem.CONVOLUTIONS_2D, rows=32, positions=128, hidden_size=64, layers=2, heads=2,
    feed_forward=128, halvings=2, width=8))
SETTINGS = ReaderSettings(steps=6, rows=4, ramp=100, warmup=2, save_every_s=1e-6)


@pytest.fixture(scope="module")
def camera() -> Camera:
    return Camera(TEXTS, FACES)


def test_symbols_spell_their_text_again() -> None:
    text = "Zoo: £5.00"
    symbols = [0]
    for symbol in encode(text).tolist():
        symbols += [symbol, symbol, 0]
    log_p_PS = torch.nn.functional.one_hot(torch.tensor(symbols)).float()
    assert decode(log_p_PS) == text
    assert decode(torch.zeros(4, 3)) == ""


def test_the_encoder_has_two_positions_or_so_a_character_and_as_many_weights_as_planned() -> None:
    model = CharacterModel(characters.default())
    weights = sum(weight.numel() for weight in model.sense.parameters())
    assert 0.6e6 <= weights <= 0.8e6
    assert model.sense.config.encoder.positions == 128


@pytest.mark.slow
def test_eight_lines_are_learnt_by_heart_in_seconds(camera: Camera) -> None:
    lines = [camera.line(f"{number}", strength=0.5, longest=12) for number in range(8)]
    batch = stacked(lines)
    x_BRW = torch.from_numpy(batch.x_BRW)
    model = CharacterModel(SMALL)
    assert model.read(x_BRW) != batch.texts
    optimizer = Optimizer(model, Schedule(autocast=False), blocks="sense.encoder.layers")
    for _ in range(150):
        model.loss(x_BRW, batch.texts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(8e-3)
    assert model.read(x_BRW) == batch.texts


def test_a_stopped_run_goes_on_to_the_same_weights(camera: Camera, tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None = None) -> CharacterModel:
        folder.mkdir(exist_ok=True)
        steps = 0

        def progress(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                raise KeyboardInterrupt

        model = CharacterModel(SMALL)
        train(model, camera, SETTINGS, folder, progress=progress)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=4)
    resumed = run(tmp_path / "stopped")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_with_other_settings_does_not_go_on(camera: Camera, tmp_path: Path) -> None:
    train(CharacterModel(SMALL), camera, replace(SETTINGS, steps=1), tmp_path)
    with pytest.raises(SettingError, match="other settings"):
        train(CharacterModel(SMALL), camera, replace(SETTINGS, peak=1e-3), tmp_path)


def test_what_is_written_reads_the_same(camera: Camera, tmp_path: Path) -> None:
    model = CharacterModel(SMALL).eval()
    characters.write(model, tmp_path)
    x_BRW = torch.randint(0, 256, (2, 32, 512), dtype=torch.uint8)
    assert torch.equal(characters.load(tmp_path)(x_BRW), model(x_BRW))
    (tmp_path / "characters.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"characters\.safetensors"):
        characters.load(tmp_path)


def test_scores_come_at_the_end_of_a_run(camera: Camera, tmp_path: Path) -> None:
    lines = reading.samples(camera, 3)
    train(CharacterModel(SMALL), camera, replace(SETTINGS, steps=1), tmp_path,
          measure=lambda model: reading.scores(model, lines))
    report = (tmp_path / "report.json").read_text("utf-8")
    assert '"clean"' in report and '"worn"' in report
    assert len((tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()) == 1


def test_characters_read_as_others_are_counted() -> None:
    class Reads(CharacterModel):
        def read(self, x_BRW: torch.Tensor) -> list[str]:
            return ["P1ay"] * len(x_BRW)

    pixels = torch.full((32, 64), 255, dtype=torch.uint8).numpy()
    found = reading.confusions(Reads(SMALL), [Picture(pixels_HW=pixels, text="Play")] * 3)
    assert found == [("l", "1", 3)]


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("peak", 0.0), ("decay", 2.0),
                                             ("steps", 0), ("minutes", -1.0)])
def test_settings_out_of_bounds_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=name):
        ReaderSettings(**{name: value})
