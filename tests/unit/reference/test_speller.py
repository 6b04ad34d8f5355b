"""A spelling is taught what the tokenizer says, also of texts with errors and spaces too many."""

import random

from cloister.reference import checkpoint_path, speller
from cloister.reference.lines import ALPHABET, label
from cloister.tokenizer import Tokenizer

FOLDER = checkpoint_path("pro")
TOKENIZER = Tokenizer.from_files(FOLDER / "tokenizer.json", FOLDER / "chat_template.jinja")
NONE = TOKENIZER.vocab_size
TEXT = "Dinner: £7.50 for a café, 2 € more"


def test_a_token_ends_at_its_last_byte() -> None:
    found = speller.ends(TEXT, TOKENIZER)
    assert [id_ for id_ in found if id_ != NONE] == TOKENIZER.encode(TEXT)
    assert len(found) == len(TEXT.encode())
    for end, id_ in enumerate(found, 1):
        if id_ != NONE:
            begin = end - len(TOKENIZER.token_of(id_))
            assert found[begin:end - 1] == [NONE] * (end - 1 - begin)


def test_texts_are_misread_as_a_reader_might_and_never_into_nothing() -> None:
    rng = random.Random(0)
    found = [speller.misread(TEXT, rng) for _ in range(400)]
    assert 0.3 < sum(text == TEXT for text in found) / len(found) < 0.8
    assert all(set(text) <= set(ALPHABET) and text == label(text) for text in found)
    assert all(speller.misread("a", rng) for _ in range(1000))


def test_a_space_too_many_ends_no_token() -> None:
    rng, tokens = random.Random(1), speller.ends(TEXT, TOKENIZER)
    longer = 0
    for _ in range(200):
        text, found = speller.spaced(TEXT.encode(), tokens, NONE, rng)
        assert label(text.decode()) == TEXT and len(found) == len(text)
        assert [id_ for id_ in found if id_ != NONE] == TOKENIZER.encode(TEXT)
        longer += len(text) > len(TEXT.encode())
    assert 10 < longer < 60
