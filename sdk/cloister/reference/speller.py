"""What an encoder of lines learns the spelling of tokens from (see `cloister.model.spelling`).

Any text teaches it, since the tokenizer knows the answer: also texts with errors, as a reader makes
them, and with spaces too many, which `ctc.decode` leaves out and a spelling is to leave out too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.reference.lines import ALPHABET, label

if TYPE_CHECKING:
    import random

    from cloister.tokenizer import Tokenizer

__all__ = ["ends", "misread", "spaced"]

_CHANGED = 0.5  # share of texts with errors
_LOST, _OTHER, _MORE = 0.01, 0.01, 0.004  # shares of their characters
_SPACED = 0.15  # share of texts with a space too many
_SPACE = ord(" ")


def misread(text: str, rng: random.Random) -> str:
    """Return `text`, or what a reader might make of it; never nothing."""
    if rng.random() >= _CHANGED:
        return text
    found = ""
    for symbol in text:
        at = rng.random() - _LOST
        if at >= 0:
            found += rng.choice(ALPHABET) if at < _OTHER else symbol
        if 0 <= at - _OTHER < _MORE:
            found += rng.choice(ALPHABET)
    return label(found) or text


def ends(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return for each byte of `text` the token that ends there, or the number of tokens for none.

    Of a byte-level vocabulary a token has as many characters as it stands for bytes.
    """
    found = [tokenizer.vocab_size] * len(text.encode())
    at = -1
    for token in tokenizer.encode(text):
        at += len(tokenizer.token_of(token))
        found[at] = token
    return found


def spaced(text: bytes, tokens: list[int], none: int, rng: random.Random) -> tuple[
    bytes, list[int]
]:
    """Return both as they are, or with a space at an end or beside one, where no token ends."""
    if rng.random() >= _SPACED:
        return text, tokens
    at = rng.choice([0, len(text), *(n for n, byte in enumerate(text) if byte == _SPACE)])
    return text[:at] + b" " + text[at:], [*tokens[:at], none, *tokens[at:]]
