"""A decoder comes to answer what is heard as it answers the words."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cloister.distill.losses import Objective
from cloister.distill.sense import Clip, SenseSettings, answers, learn
from cloister.errors import SettingError
from cloister.model.config import ModelConfig
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.generate import generate
from cloister.model.projector import ProjectorKind, ProjectorShape, TokenProjector, projector
from cloister.model.transformer import Decoder
from cloister.tiers import Shape

WORDS, END, SIZE = 24, 0, 16
SHAPE = Shape(vocab_size=WORDS, hidden_size=SIZE, layers=2, heads=2, kv_heads=1, head_size=8,
              feed_forward=32, context=48, tied=False)
ENCODER = EncoderShape(
    stem=Stem.CONVOLUTIONS_2D, rows=8, positions=32, hidden_size=WORDS, layers=1, heads=1,
    feed_forward=8, halvings=1, width=2)
SETTINGS = SenseSettings(steps=150, clips=8, peak=0.1, warmup=2)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    decoder = Decoder(ModelConfig(shape=SHAPE))
    decoder.initialize(0)
    with torch.no_grad():  # an answer is to depend on every word
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return decoder.eval().requires_grad_(False)


def hard_of_hearing(decoder: Decoder) -> TokenProjector:
    """One that takes each odd word for the word before it, though its vectors differ."""
    made = projector(
        ProjectorShape(kind=ProjectorKind.TOKENS, size=SIZE, vocabulary=WORDS), ENCODER)
    assert isinstance(made, TokenProjector)
    made.norm = nn.Identity()
    with torch.no_grad():
        made.head.bias.zero_()
        made.head.weight.zero_()
        for word in range(WORDS):
            made.head.weight[word - word % 2, word] = 1
    made.read_with(decoder.embed_tokens)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def clips(decoder: Decoder) -> list[Clip]:
    rng = torch.Generator().manual_seed(1)
    made = []
    for _ in range(40):
        words = (torch.randperm(WORDS // 2, generator=rng)[:4] * 2 + 1).tolist()
        x_ND = nn.functional.one_hot(torch.tensor(words), WORDS).float()
        (answer,) = generate(decoder, [[2, *words, 4]], end=(END,), limit=5)
        made.append(Clip(
            x_ND=x_ND, before=(2,), words=tuple(words), after=(4,), answer=(*answer, END)))
    return made


def test_a_teacher_that_reads_the_words_is_followed_by_ear(decoder, clips) -> None:
    deaf = hard_of_hearing(decoder)
    wanted = [list(clip.answer[:-1]) for clip in clips]
    before = answers(deaf, decoder, clips, end=(END,), limit=5)
    taken = learn(deaf, decoder, clips[:32], SETTINGS, teacher=decoder)
    after = answers(deaf, decoder, clips, end=(END,), limit=5)
    assert sum(taken[-5:]) < sum(taken[:5]) / 5
    right = [sum(map(list.__eq__, said, wanted)) for said in (before, after)]
    assert right[0] < 12 < 22 < right[1]
    assert sum(map(list.__eq__, after[32:], wanted[32:])) > sum(
        map(list.__eq__, before[32:], wanted[32:]))


def test_what_is_heard_right_needs_no_correction(decoder, clips) -> None:
    well = hard_of_hearing(decoder)
    with torch.no_grad():
        well.head.weight.copy_(torch.eye(WORDS + 1)[:, :WORDS])
    assert answers(well, decoder, clips, end=(END,), limit=5) == [
        list(clip.answer[:-1]) for clip in clips]


def test_without_a_teacher_the_labels_teach(decoder, clips) -> None:
    deaf = hard_of_hearing(decoder)
    taken = learn(deaf, decoder, clips, replace(SETTINGS, objective=Objective(hard=1.0)))
    assert sum(taken[-5:]) < sum(taken[:5])


def test_only_the_correction_changes_and_repeats_from_its_seed(decoder, clips) -> None:
    runs = []
    for _ in range(2):
        deaf = hard_of_hearing(decoder)
        whole = {name: value.clone() for name, value in deaf.state_dict().items()}
        runs.append(learn(deaf, decoder, clips, replace(SETTINGS, steps=3), teacher=decoder))
        changed = {name for name, value in deaf.state_dict().items()
                   if not torch.equal(value, whole[name])}
        assert changed == {"correction.weight"}
    assert runs[0] == runs[1]


def test_nothing_to_learn_from_is_refused(decoder, clips) -> None:
    deaf = hard_of_hearing(decoder)
    with pytest.raises(SettingError, match="no teacher"):
        learn(deaf, decoder, clips, SETTINGS)
    with pytest.raises(SettingError, match="no clips"):
        learn(deaf, decoder, [], SETTINGS, teacher=decoder)


@pytest.mark.parametrize("change", [{"steps": 0}, {"clips": 0}, {"warmup": -1}, {"peak": 0.0}])
def test_settings_out_of_bounds_are_refused(change) -> None:
    with pytest.raises(SettingError):
        replace(SETTINGS, **change)
