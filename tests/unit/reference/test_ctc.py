"""An encoder with its two readings is read back as it was written, and becomes a projector."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister.distill.optimizer import Optimizer
from cloister.distill.schedule import Schedule
from cloister.errors import CheckpointError, SettingError, TrainingError
from cloister.evaluate.transcript import LETTERS
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.front import MelShape
from cloister.model.projector import TokenProjector
from cloister.model.sense import SenseConfig
from cloister.reference import ctc, listener, reader
from cloister.reference.ctc import CtcModel
from cloister.reference.lines import ALPHABET

SMALL = SenseConfig(
    encoder=EncoderShape(
        stem=Stem.CONVOLUTIONS_2D, rows=16, positions=100, hidden_size=32, layers=1, heads=2,
        feed_forward=64, halvings=2, width=4),
    mel=MelShape(bins=16))


@pytest.mark.parametrize(("alphabet", "text"), [(LETTERS, "soo a"), (ALPHABET, "Zoo: £5.00")])
def test_text_comes_back_from_its_symbols_once_repeats_and_blanks_are_dropped(
    alphabet: str, text: str
) -> None:
    symbols = [0]
    for symbol in text:
        symbols += [1 + alphabet.index(symbol)] * 2 + [0]
    log_p_PS = torch.nn.functional.one_hot(torch.tensor(symbols)).float()
    assert ctc.decode(log_p_PS, alphabet) == text
    assert ctc.decode(torch.zeros(4, 3), alphabet) == ""


def test_a_model_gives_the_same_result_for_a_recording_alone_and_in_a_batch() -> None:
    model = CtcModel(SMALL, LETTERS, 50).eval()
    x_BN = torch.randn(3, SMALL.samples_per_vector * 20) * 0.1
    with torch.inference_mode():
        together = model.letters(model.encode(model.features(x_BN)))
        alone = [model.letters(model.encode(model.features(row))) for row in x_BN.split(1)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-2, rtol=1e-2)
    assert together.shape == (3, 20, 1 + len(LETTERS))


@pytest.mark.parametrize(("config", "spelled"), [(SMALL, False), (reader.config(), True)])
def test_what_is_written_is_read_back_and_what_is_no_encoder_is_refused(
    config: SenseConfig, spelled: bool, tmp_path: Path
) -> None:
    model = CtcModel(config, ALPHABET, 50, seed=4, pieces=[b"a"] * 50 if spelled else ())
    ctc.write(model, tmp_path)
    read = ctc.load(tmp_path)
    assert read.sense.config == config and read.alphabet == ALPHABET and read.vocabulary == 50
    assert read.spelled == spelled
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)
    ctc.write(model, tmp_path, torch.bfloat16)
    for name, value in ctc.load(tmp_path).state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=0, rtol=2**-8)
    (tmp_path / "heads.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"heads\.safetensors"):
        ctc.load(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no sense"):
        ctc.load(tmp_path)
    with pytest.raises(TrainingError, match="train it first"):
        ctc.load(tmp_path / "nothing")


def test_a_projector_finds_the_tokens_that_the_training_found() -> None:
    model = CtcModel(SMALL, LETTERS, 50).eval()
    with torch.no_grad():
        model.tokens.weight.normal_()
    sense, x_BCRW = ctc.token_sense(model, 24), model.features(torch.randn(1, 16_000) * 0.1)
    projector = sense.projector
    assert isinstance(projector, TokenProjector)
    projector.read_with(lambda tokens: torch.zeros(*tokens.shape, 24))
    with torch.inference_mode():
        best_N = model.tokens(model.norm(model.encode(x_BCRW)))[0].argmax(-1)
        x_ND = sense.projector.norm(sense.encoder(x_BCRW))[0]
        found_N = projector.head(x_ND).argmax(-1)
        assert (found_N == best_N).float().mean() > 0.9  # one is in bfloat16
        vectors = sense(torch.randn(1, 1, 16_000) * 0.1)
    assert vectors.shape[2] == 24 and not vectors.any()


def test_the_encoders_of_the_family_are_of_the_size_that_is_planned() -> None:
    for config, positions in ((listener.config(), 400), (reader.config(), 128)):
        model = CtcModel(config, LETTERS, 4096)
        weights = sum(weight.numel() for weight in model.sense.parameters())
        assert 1.5e6 < weights < 3e6
        assert config.encoder.positions == positions


def test_what_is_frozen_stays_and_the_rest_is_trained() -> None:
    config = replace(SMALL, encoder=replace(SMALL.encoder, layers=3))
    model = CtcModel(config, LETTERS, 50)
    model.freeze(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = Optimizer(model, Schedule(peak=1e-2), blocks=model.blocks)
    model.loss(model.features(torch.randn(1, SMALL.samples_per_vector * 20)), ["a"], [[3]]
               ).backward()
    optimizer.step(1e-2)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    first = ("sense.encoder.stem.", "sense.encoder.positions", "sense.encoder.layers.0.",
             "sense.encoder.layers.1.")
    assert same == {name for name in before if name.startswith(first)}
    for layers in (0, 3):
        with pytest.raises(SettingError, match=f"^{layers} layers cannot be frozen; from 1 to 2"):
            model.freeze(layers)
