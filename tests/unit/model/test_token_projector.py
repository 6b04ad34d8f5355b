"""A decoder reads of a picture or a recording the tokens in it, each once and in order."""

import pytest
import torch
from torch import nn

from cloister.errors import SettingError
from cloister.model.encoder import EncoderShape, Stem
from cloister.model.projector import ProjectorKind, ProjectorShape, TokenProjector, projector

ENCODER = EncoderShape(
    stem=Stem.CONVOLUTIONS_2D, rows=8, positions=16, hidden_size=6, layers=1, heads=1,
    feed_forward=8, halvings=1, width=2)
SHAPE = ProjectorShape(kind=ProjectorKind.TOKENS, size=4, vocabulary=5)
NONE = 5


@pytest.fixture
def made() -> tuple[TokenProjector, nn.Embedding]:
    made, embed = projector(SHAPE, ENCODER), nn.Embedding(5, 4)
    assert isinstance(made, TokenProjector)
    made.read_with(embed)
    with torch.no_grad():  # the largest of the entries is the token
        made.norm = nn.Identity()
        made.head.weight.copy_(torch.eye(6))
        made.head.bias.zero_()
    return made, embed


def frames(*tokens: int) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor([tokens]), 6).float()


@pytest.mark.parametrize(("seen", "read"), [
    ((NONE, 2, 2, NONE, 2, 3, 3, NONE), [2, 2, 3]),
    ((1,), [1]),
    ((0, 0, 0), [0]),
    ((NONE, NONE, 4), [4]),
    ((3, 1, 3, 1), [3, 1, 3, 1]),
])
def test_each_token_is_read_once_and_in_order(made, seen, read) -> None:
    module, embed = made
    assert torch.equal(module(frames(*seen)), embed(torch.tensor([read])))


def test_where_no_token_is_found_one_vector_stands_for_it(made) -> None:
    module, _ = made
    assert torch.equal(module(frames(NONE, NONE, NONE)), torch.zeros(1, 1, 4))
    nn.init.normal_(module.correction.weight)
    x = frames(NONE, NONE)
    assert torch.equal(module(x), module.correction(x[:, 1:]))


def test_the_correction_is_added_to_the_embedding(made) -> None:
    module, embed = made
    nn.init.normal_(module.correction.weight)
    x = frames(NONE, 2, 3)
    assert torch.allclose(
        module(x)[0], embed(torch.tensor([2, 3])) + module.correction(x[0, 1:]))


def test_rows_of_a_batch_are_kept_as_each_by_itself(made) -> None:
    module, _ = made
    rows = torch.cat([frames(1, 1, NONE, 2), frames(*4 * [NONE]), frames(3, NONE, 3, 3)])
    _, tokens = module.found(rows)
    assert tokens.tolist() == [[1, NONE, NONE, 2], 4 * [NONE], [3, NONE, 3, NONE]]
    kept = [module.kept(module.found(row[None])[1])[0] for row in rows]
    assert torch.equal(module.kept(tokens), torch.stack(kept))
    assert module.kept(tokens).sum(1).tolist() == [2, 1, 2]


def test_the_embedding_is_no_weight_of_the_projector(made) -> None:
    module, _ = made
    assert {name.split(".")[0] for name in module.state_dict()} == {"head", "correction"}


@pytest.mark.parametrize("given", [
    {"kind": ProjectorKind.TOKENS}, {"kind": ProjectorKind.POOL, "vocabulary": 5},
    {"kind": ProjectorKind.TOKENS, "vocabulary": 5, "factor": 2},
    {"kind": ProjectorKind.TOKENS, "vocabulary": 2**24 + 1},
    {"kind": ProjectorKind.POOL, "alphabet": "ab"},
    {"kind": ProjectorKind.TOKENS, "vocabulary": 5, "alphabet": "aba"}])
def test_a_vocabulary_and_an_alphabet_belong_to_tokens_alone(given) -> None:
    with pytest.raises(SettingError, match=r"vocabulary|alphabet"):
        ProjectorShape(size=4, **given)
