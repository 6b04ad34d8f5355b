"""Characters at an encoder's positions become tokens that spell them exactly, however divided."""

import pytest
import torch
from torch import nn

from cloister.model.spelling import LONGEST, Spelling

ALPHABET = "ab é€"
PIECES = [b"", *(bytes([byte]) for byte in range(1, 256)), b"ab", b" b", "é".encode(),
          b"a" * (LONGEST + 1)]
NONE = len(PIECES)


class _Given(nn.Module):
    """Ends where it is told."""

    def __init__(self, *ends: int) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, x_BKD: torch.Tensor) -> torch.Tensor:
        out_BK1 = torch.full((*x_BKD.shape[:2], 1), -1.0)
        out_BK1[:, list(self.ends)] = 1.0
        return out_BK1


def made(*ends: int) -> Spelling:
    module = Spelling(ALPHABET, 256, NONE)
    module.initialize(torch.Generator().manual_seed(0), PIECES)
    with torch.no_grad():
        module.symbols.weight.copy_(torch.eye(1 + len(ALPHABET), 256))
        module.symbols.bias.zero_()
    module.layers, module.norm, module.ends = nn.ModuleList(), nn.Identity(), _Given(*ends)
    return module


def read(text: str, *ends: int, room: int = 4) -> list[bytes]:
    """The pieces that a text is divided into, with room behind it."""
    bytes_1K = nn.functional.pad(torch.tensor([[*text.encode()]], dtype=torch.int64), (0, room))
    return [PIECES[token] for token in made(*ends).tokens(bytes_1K)[0].tolist() if token != NONE]


@pytest.mark.parametrize(("ends", "pieces"), [
    ((1, 3, 5), [b"ab", b" b", "é".encode()]),
    ((1, 3), [b"ab", b" b", "é".encode()]),  # the last byte ends one
    ((), [bytes([byte]) for byte in "ab bé".encode()]),  # no token: each byte by itself
    ((0, 3, 5), [b"a", b"b", b" ", b"b", "é".encode()]),
    ((1, 3, 4), [b"ab", b" b", b"\xc3", b"\xa9"]),
])
def test_a_division_gives_its_tokens_and_single_bytes_where_there_is_none(ends, pieces) -> None:
    assert read("ab bé", *ends) == pieces
    assert read("ab bé", *ends, room=0) == pieces


def test_every_division_of_every_text_spells_it() -> None:
    rng = torch.Generator().manual_seed(1)
    for text in ("a", "é€é", "ab ab ba", "b" * 40, "a" * (LONGEST + 1), "a b" * 9):
        for _ in range(20):
            size = len(text.encode())
            ends = torch.randperm(size, generator=rng)[:size // 3].tolist()
            assert b"".join(read(text, *ends)) == text.encode()


def test_spaces_beside_others_or_at_the_ends_are_left_out() -> None:
    assert read(" ab  b ", 2, 5) == [b"ab", b" b"]
    assert read("ab  ", 1) == [b"ab"]


def test_nothing_read_is_no_token() -> None:
    assert read("", room=6) == []


def positions(*symbols: str) -> torch.Tensor:
    """What an encoder gives for each character, "" for none."""
    at = torch.tensor([[1 + ALPHABET.index(each) if each else 0 for each in symbols]])
    return nn.functional.one_hot(at, 256).float()


def test_each_character_gives_its_bytes_once_and_in_order() -> None:
    x_1ND = positions("", "a", "a", "", "a", "é", "é", " ", "€", "", "", "", "")
    at_1KD, tokens_1K = made()(x_1ND)
    found = b"".join(PIECES[token] for token in tokens_1K[0].tolist() if token != NONE)
    assert found.decode() == "aaé €"
    # The vectors are those of the characters, of one with several bytes for each.
    wanted = [1, 4, 5, 5, 7, 8, 8, 8]
    assert torch.equal(at_1KD[0, :len(wanted)], x_1ND[0, wanted])
    assert not at_1KD[0, len(wanted):].any()


def test_more_bytes_than_positions_are_cut() -> None:
    _, tokens_1K = made()(positions("€", "é", "€"))
    assert b"".join(PIECES[token] for token in tokens_1K[0].tolist()) == "€".encode()


def test_rows_of_a_batch_are_read_as_each_by_itself() -> None:
    module = Spelling(ALPHABET, 16, NONE).eval()
    module.initialize(torch.Generator().manual_seed(0), PIECES)
    x_BND = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(2))
    for whole, *parts in zip(module(x_BND), *(module(row[None]) for row in x_BND), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))
