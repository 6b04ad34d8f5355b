"""From characters to the tokens that they are written in, inside a program.

A tokenizer is code that no program of ExecuTorch holds, so its merges are learnt: each byte of a
text is told whether a token ends there, and which (see `reference.speller`).

Shapes: B batch, N positions of an encoder, S symbols, K bytes, D size, V tokens.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Spelling", "SpellingBlock", "begins"]

_LAYERS = 3
_KERNEL = 11  # bytes that a layer reads around each
_WIDER = 2  # times the size, between the two matrices of a layer


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

    A row has as many bytes as positions; what is longer is cut, which no line of text is.
    """

    def __init__(self, alphabet: str, size: int, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.symbols = nn.Linear(size, 1 + len(alphabet))
        self.letters = nn.Embedding(256, size)
        self.layers = nn.ModuleList(SpellingBlock(size) for _ in range(_LAYERS))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, vocabulary + 1)
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

    def initialize(self, rng: torch.Generator) -> None:
        """Set weights to train from."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("letters"):
                    parameter.normal_(generator=rng)
                elif parameter.dim() > 2:
                    parameter.normal_(std=_KERNEL**-0.5, generator=rng)
                elif parameter.dim() == 2:
                    parameter.normal_(std=0.02, generator=rng)
                else:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)

    def forward(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's vectors at each byte, and the token that ends there, int64[B, K]."""
        best_BN = self.symbols(x_BND).argmax(-1)
        lengths_BN = self.lengths_S[best_BN] * begins(best_BN, 0)
        ends_BN = lengths_BN.cumsum(-1)
        at_BKN = torch.arange(x_BND.shape[1], device=x_BND.device)[:, None] - (
            ends_BN - lengths_BN).unsqueeze(1)  # which byte of a character a place holds
        letters_BND = torch.zeros_like(x_BND)
        where_BKN = torch.zeros_like(at_BKN, dtype=x_BND.dtype)
        for number in range(self.bytes_SJ.shape[1]):
            here_BKN = ((at_BKN == number) & (number < lengths_BN.unsqueeze(1))).to(x_BND.dtype)
            letters_BND = letters_BND + here_BKN @ self.letters(self.bytes_SJ[best_BN, number])
            where_BKN = where_BKN + here_BKN
        tokens_BK = self.head(self.hidden(letters_BND)).argmax(-1)  # none is the last
        beyond_BK = torch.arange(
            x_BND.shape[1], device=x_BND.device) >= ends_BN[..., -1:]
        return where_BKN @ x_BND, tokens_BK.masked_fill(beyond_BK, self.vocabulary)

    def hidden(self, letters_BKD: torch.Tensor) -> torch.Tensor:
        """Return what the head reads at each byte, [B, K, D]."""
        for layer in self.layers:
            letters_BKD = layer(letters_BKD)
        out_BKD: torch.Tensor = self.norm(letters_BKD)
        return out_BKD
