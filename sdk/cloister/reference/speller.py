"""What an encoder of lines learns the spelling of tokens from (see `cloister.model.spelling`).

Any text teaches where tokens end, since the tokenizer knows the answer: also texts with errors, as
a reader makes them, and with spaces too many, which a spelling leaves out as `ctc.decode` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.reference.lines import ALPHABET, LONGEST, label
from cloister.reference.vocabulary import SPECIAL

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from cloister.reference.lines import Texts
    from cloister.tokenizer import Tokenizer

__all__ = ["ends", "invented", "misread", "parts", "pieces", "spaced", "text"]

_CHANGED = 0.5  # share of texts with errors
_LOST, _OTHER, _MORE = 0.01, 0.01, 0.004  # shares of their characters
_SPACED = 0.15  # share of texts with a space too many
_INVENTED = 0.35  # share of texts, see `text`
_CASED = 0.4  # share of their words that begin with a capital, or have capitals alone
_PART = 10  # characters of a token that words are made of
_DRAWN = set(ALPHABET)
_SPACE = ord(" ")


def text(source: Texts, made_of: Sequence[str], rng: random.Random) -> str:
    """Return a line to spell: of `source`, or invented."""
    invented_ = rng.random() < _INVENTED
    line = invented(made_of, rng) if invented_ else label(source.line(rng))
    return misread(line, rng)


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


def invented(parts: Sequence[str], rng: random.Random) -> str:
    """Return a line of words that nobody has written, of `parts` of tokens: it may be a name."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) < LONGEST // 2:
        word = "".join(rng.choices(parts, k=rng.randint(1, 4)))
        words.append(rng.choice((word, word.title(), word.upper())) if rng.random() < _CASED
                     else word)
    return label(" ".join(words))[:LONGEST].strip()


def parts(tokenizer: Tokenizer) -> list[str]:
    """Return what words are `invented` of: the tokens of the alphabet, without spaces."""
    texts = (piece.decode(errors="ignore").strip() for piece in pieces(tokenizer))
    return [text for text in texts if 0 < len(text) <= _PART and set(text) <= _DRAWN]


def ends(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return 1 for each byte of `text` at which a token ends, 0 for the others.

    Of a byte-level vocabulary a token has as many characters as it stands for bytes.
    """
    found = [0] * len(text.encode())
    at = -1
    for token in tokenizer.encode(text):
        at += len(tokenizer.token_of(token))
        found[at] = 1
    return found


def spaced(text: bytes, ends_: list[int], rng: random.Random) -> tuple[bytes, list[int]]:
    """Return both as they are, or with a space at an end or beside one, where no token ends."""
    if rng.random() >= _SPACED:
        return text, ends_
    at = rng.choice([0, len(text), *(n for n, byte in enumerate(text) if byte == _SPACE)])
    return text[:at] + b" " + text[at:], [*ends_[:at], 0, *ends_[at:]]


def pieces(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of each token, b"" of one that stands for no text.

    A byte-level vocabulary writes bytes that are no printable character of Latin-1 as those from
    number 256 on (GPT-2).
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    codes = {chr(byte): byte for byte in printed}
    codes |= {chr(256 + number): byte for number, byte in enumerate(others)}
    special = set(map(tokenizer.id_of, SPECIAL))
    return [b"" if token in special else bytes(map(codes.__getitem__, tokenizer.token_of(token)))
            for token in range(tokenizer.vocab_size)]
