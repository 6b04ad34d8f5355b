"""From characters to the tokens that they are written in, inside a program.

A tokenizer is code that no program of ExecuTorch holds. Where it divides a text is learnt; the
token of each piece is looked up among the vocabulary's. So tokens spell what was read exactly, and
a division that is not the tokenizer's costs some tokens more, and no letter.

Shapes: B batch, N positions of an encoder, S symbols, K bytes, D size, V tokens, J bytes of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LONGEST", "Spelling", "SpellingBlock", "begins"]

LONGEST = 16  # bytes of a token that is looked up
_LAYERS = 3
_KERNEL = 11  # bytes that a layer reads around each
_WIDER = 2  # times the size, between the two matrices of a layer
_SPACE = ord(" ")


def begins(best_BN: torch.Tensor, none: int) -> torch.Tensor:
    """Return which positions begin a symbol, bool[..., N]: those unlike the one before.

    This is how connectionist temporal classification is read (Graves et al., ICML 2006).
    """
    before_BN = torch.cat((torch.full_like(best_BN[..., :1], none), best_BN[..., :-1]), -1)
    return (best_BN != none) & (best_BN != before_BN)


class SpellingBlock(nn.Module):
    """A convolution over bytes, each entry by itself, and two matrices, behind a residual."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.depth = nn.Conv1d(
            size, size, kernel_size=_KERNEL, padding=_KERNEL // 2, groups=size)
        self.norm = nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, _WIDER * size), nn.Linear(_WIDER * size, size)

    def forward(self, x_BKD: torch.Tensor) -> torch.Tensor:
        """Map [B, K, D] -> [B, K, D]."""
        around_BKD = self.depth(x_BKD.transpose(1, 2)).transpose(1, 2)
        out_BKD: torch.Tensor = x_BKD + self.down(functional.gelu(self.up(self.norm(around_BKD))))
        return out_BKD


class Spelling(nn.Module):
    """Characters of `alphabet` at positions of an encoder, number 0 for none, to tokens.

    A row has as many bytes as positions; what is longer is cut, which no line of text is. Spaces
    beside others or at the ends are left out.
    """

    def __init__(self, alphabet: str, size: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.symbols = nn.Linear(size, 1 + len(alphabet))
        self.letters = nn.Embedding(256, size)
        self.layers = nn.ModuleList(SpellingBlock(size) for _ in range(_LAYERS))
        self.norm, self.ends = nn.LayerNorm(size), nn.Linear(size, 1)
        # Bytes of each token, the last first; -1 in those that are not looked up.
        self.pieces_JV = nn.Parameter(torch.full((LONGEST, vocabulary), -1.0), requires_grad=False)
        spelled = [b"", *(symbol.encode() for symbol in alphabet)]
        longest = max(map(len, spelled))
        self.bytes_SJ: torch.Tensor
        self.lengths_S: torch.Tensor
        self.register_buffer("bytes_SJ", torch.tensor(
            [[*each, *[0] * (longest - len(each))] for each in spelled], device="cpu"),
            persistent=False)
        self.register_buffer(
            "lengths_S", torch.tensor([len(each) for each in spelled], device="cpu"),
            persistent=False)

    def initialize(self, rng: torch.Generator, pieces: Sequence[bytes]) -> None:
        """Set weights to train from; `pieces` are the bytes of each token, b"" of a special one."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("letters"):
                    parameter.normal_(generator=rng)
                elif name.startswith("pieces"):
                    parameter.fill_(-1.0)
                elif parameter.dim() > 2:
                    parameter.normal_(std=_KERNEL**-0.5, generator=rng)
                elif parameter.dim() == 2:
                    parameter.normal_(std=0.02, generator=rng)
                else:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            for token, piece in enumerate(pieces):
                if 0 < len(piece) <= LONGEST:
                    self.pieces_JV[:, token] = 0.0
                    self.pieces_JV[:len(piece), token] = torch.tensor([*map(float, piece[::-1])])

    def forward(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's vectors at each byte, and the token that ends there, int64[B, K]."""
        bytes_BK, where_BKN = self.placed(self.symbols(x_BND).argmax(-1))
        tokens_BK = self.tokens(bytes_BK)
        return where_BKN @ x_BND, tokens_BK

    def placed(self, best_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bytes of the symbols, then 0: int64[B, K], and where each was, [B, K, N]."""
        lengths_BN = self.lengths_S[best_BN] * begins(best_BN, 0)
        at_BKN = torch.arange(best_BN.shape[1], device=best_BN.device)[:, None] - (
            lengths_BN.cumsum(-1) - lengths_BN).unsqueeze(1)  # which byte of a symbol one is
        bytes_BK = torch.zeros_like(best_BN)
        where_BKN = torch.zeros_like(at_BKN, dtype=torch.float32)
        for number in range(self.bytes_SJ.shape[1]):
            here_BKN = (at_BKN == number) & (number < lengths_BN.unsqueeze(1))
            bytes_BK = bytes_BK + (
                here_BKN.long() * self.bytes_SJ[best_BN, number].unsqueeze(1)).sum(-1)
            where_BKN = where_BKN + here_BKN.float()
        return bytes_BK, where_BKN

    def tokens(self, bytes_BK: torch.Tensor) -> torch.Tensor:
        """Return the token that ends at each byte of texts, `vocabulary` for none: int64[B, K]."""
        there_BK = bytes_BK > 0
        after_BK = functional.pad(bytes_BK[:, 1:], (0, 1))
        before_BK = functional.pad(bytes_BK[:, :-1], (1, 0))
        extra_BK = (bytes_BK == _SPACE) & (
            (after_BK == _SPACE) | (after_BK == 0) | (before_BK == 0))
        letters_BKD = self.letters(bytes_BK) * there_BK.unsqueeze(-1)
        ends_BK = (self.hidden(letters_BKD).squeeze(-1) > 0) | extra_BK | (after_BK == 0)
        ends_BK = ends_BK | functional.pad(extra_BK[:, 1:], (0, 1))
        piece_BK = ends_BK.long().cumsum(-1) - ends_BK.long()  # number of that which a byte is in
        inside = [
            functional.pad(bytes_BK, (back, 0))[:, :bytes_BK.shape[1]] * (
                functional.pad(piece_BK, (back, 0), value=-1)[:, :bytes_BK.shape[1]] == piece_BK
            ).long()
            for back in range(LONGEST + 1)]
        token_BK, known_BK = self._looked_up(torch.stack(inside[:LONGEST], -1).float())
        known_BK = known_BK & (inside[LONGEST] == 0)  # else its first bytes are beyond
        wrong_BK = ends_BK & ~known_BK
        # Each byte of a piece that is no token is one.
        same_BKK = piece_BK.unsqueeze(1) == piece_BK.unsqueeze(2)
        alone_BK = (same_BKK & wrong_BK.unsqueeze(1)).any(-1)
        single_BK, _ = self._looked_up(functional.pad(
            bytes_BK.unsqueeze(-1).float(), (0, LONGEST - 1)))
        found_BK = torch.where(alone_BK, single_BK, token_BK)
        none_BK = ~there_BK | extra_BK | ~(ends_BK | alone_BK)
        return found_BK.masked_fill(none_BK, self.vocabulary)

    def hidden(self, letters_BKD: torch.Tensor) -> torch.Tensor:
        """Return the logits of a token's end at each byte, [B, K, 1]."""
        for layer in self.layers:
            letters_BKD = layer(letters_BKD)
        out_BK1: torch.Tensor = self.ends(self.norm(letters_BKD))
        return out_BK1

    def _looked_up(self, piece_BKJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token nearest to each piece, and whether that is what it is.

        The squared distance, but for what the piece adds; products of bytes are exact in float32.
        """
        size_V = self.pieces_JV.square().sum(0)
        near_BKV = 2 * (piece_BKJ @ self.pieces_JV) - size_V
        best_BK = near_BKV.argmax(-1)
        most_BK = near_BKV.amax(-1)
        return best_BK, most_BK == piece_BKJ.square().sum(-1)
