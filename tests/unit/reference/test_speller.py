"""Where tokens end is taught as the tokenizer has it, also with errors and spaces too many."""

import random

from cloister.reference import checkpoint_path, speller
from cloister.reference.lines import ALPHABET, LONGEST, label
from cloister.reference.vocabulary import SPECIAL
from cloister.tokenizer import Tokenizer

FOLDER = checkpoint_path("pro")
TOKENIZER = Tokenizer.from_files(FOLDER / "tokenizer.json", FOLDER / "chat_template.jinja")
TEXT = "Dinner: £7.50 for a café, 2 € more"


def test_the_pieces_are_the_bytes_that_tokens_stand_for() -> None:
    pieces = speller.pieces(TOKENIZER)
    assert b"".join(pieces[token] for token in TOKENIZER.encode(TEXT)) == TEXT.encode()
    assert {bytes([byte]) for byte in range(256)} < set(pieces)
    assert [pieces[TOKENIZER.id_of(marker) or 0] for marker in SPECIAL] == [b""] * len(SPECIAL)
    assert len(pieces) == TOKENIZER.vocab_size


def test_a_token_ends_at_its_last_byte() -> None:
    pieces, ends = speller.pieces(TOKENIZER), speller.ends(TEXT, TOKENIZER)
    at, wanted = 0, [0] * len(TEXT.encode())
    for token in TOKENIZER.encode(TEXT):
        at += len(pieces[token])
        wanted[at - 1] = 1
    assert ends == wanted


def test_texts_are_misread_as_a_reader_might_and_never_into_nothing() -> None:
    rng = random.Random(0)
    found = [speller.misread(TEXT, rng) for _ in range(400)]
    assert 0.3 < sum(text == TEXT for text in found) / len(found) < 0.8
    assert all(set(text) <= set(ALPHABET) and text == label(text) for text in found)
    assert all(speller.misread("a", rng) for _ in range(1000))


def test_invented_lines_are_of_the_alphabet_and_of_no_one_kind() -> None:
    rng, parts = random.Random(2), speller.parts(TOKENIZER)
    found = {speller.invented(parts, rng) for _ in range(200)}
    assert len(found) > 190
    assert all(0 < len(line) <= LONGEST and set(line) <= set(ALPHABET) for line in found)
    assert all(line == label(line) for line in found)


def test_a_space_too_many_ends_no_token() -> None:
    rng, ends = random.Random(1), speller.ends(TEXT, TOKENIZER)
    longer = 0
    for _ in range(200):
        text, found = speller.spaced(TEXT.encode(), ends, rng)
        assert label(text.decode()) == TEXT and len(found) == len(text)
        assert sum(found) == sum(ends)
        longer += len(text) > len(TEXT.encode())
    assert 10 < longer < 60
