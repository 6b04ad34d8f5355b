"""Characters at an encoder's positions become the bytes that they are written in, each once."""

import torch
from torch import nn

from cloister.model.spelling import Spelling

ALPHABET = "ab é€"
SYMBOLS = 1 + len(ALPHABET)


def made() -> Spelling:
    """A spelling that finds at each byte what stands for it: of `tokens` the bytes themselves."""
    module = Spelling(ALPHABET, 256, 256)
    with torch.no_grad():
        module.symbols.weight.copy_(torch.eye(SYMBOLS, 256))
        module.symbols.bias.zero_()
        module.letters.weight.copy_(torch.eye(256))
        module.head.weight.copy_(torch.eye(257, 256))
        module.head.bias.zero_()
        module.head.bias[256] = 0.5  # none, where there is no byte
    module.layers, module.norm = nn.ModuleList(), nn.Identity()
    return module


def positions(*symbols: str) -> torch.Tensor:
    """What an encoder gives for each character, "" for none."""
    at = torch.tensor([[1 + ALPHABET.index(each) if each else 0 for each in symbols]])
    return nn.functional.one_hot(at, 256).float()


def test_each_character_gives_its_bytes_once_and_in_order() -> None:
    x_1ND = positions("", "a", "a", "", "a", "é", "é", " ", "€", "", "", "", "")
    at_1KD, tokens_1K = made()(x_1ND)
    found = [token for token in tokens_1K[0].tolist() if token != 256]
    assert bytes(found).decode() == "aaé €"
    # The vectors are those of the characters, of one with several bytes for each.
    wanted = [1, 4, 5, 5, 7, 8, 8, 8]
    assert torch.equal(at_1KD[0, :len(wanted)], x_1ND[0, wanted])
    assert not at_1KD[0, len(wanted):].any()


def test_more_bytes_than_positions_are_cut_and_none_leave_none() -> None:
    _, tokens_1K = made()(positions("€", "é", "€"))
    assert bytes(tokens_1K[0].tolist()) == "€".encode()
    _, tokens_1K = made()(positions("", "", ""))
    assert tokens_1K.tolist() == [[256, 256, 256]]


def test_rows_of_a_batch_are_read_as_each_by_itself() -> None:
    torch.manual_seed(0)
    module = Spelling(ALPHABET, 16, 40).eval()
    x_BND = torch.randn(3, 12, 16)
    for whole, *parts in zip(module(x_BND), *(module(row[None]) for row in x_BND), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))
