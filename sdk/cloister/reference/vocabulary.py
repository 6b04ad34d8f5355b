"""The tokenizer of the reference family: byte-level BPE with 4096 entries."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cloister.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["SPECIAL", "TEMPLATE", "train"]

SIZE = 4096
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FUSED = 256  # words that have an entry with the space before them
# A tool call's fixed parts, each of which may become one token, and so may a label. Then one digit
# at a time, so that numbers are spelled alike wherever they stand; words; runs of punctuation.
_PIECES = (
    r'\{"name": "\w+", "arguments": \{(?:\}\})?|"(?:, ")?\w+": "|"\}\}| ?\[[A-Z]+\]'
    r"|\p{N}|%s\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
)


def train(directory: Path, texts: Iterable[str]) -> None:
    """Write `tokenizer.json`, trained on `texts`, and `chat_template.jinja`.

    A word is spelled with the same tokens whether a space, a quote or nothing stands before it: an
    answer copies what the request says. So merges are learnt without spaces, and only the FUSED
    commonest words, which are learnt by heart, take the space before them in. The same texts give
    the same files.

    Raises:
        DataError: the texts are too few for the vocabulary.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitter("")
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SIZE - FUSED,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    words = Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+", text))
    whole, begun = Counter[str](), Counter[str]()
    for word, count in words.items():
        first = tokenizer.encode(word).tokens[0]
        (whole if first == word else begun)[first] += count
    for word, count in whole.most_common():
        if len(vocabulary) == SIZE:
            break
        # The last merges, so that they join what is whole; not where they would take the space
        # into the beginning of other words as well.
        if len(word) > 1 and begun[word] < count / 10:
            merges.append((_SPACE, word))
            vocabulary[_SPACE + word] = len(vocabulary)
    if len(vocabulary) != SIZE:
        raise DataError(f"The texts give {len(vocabulary)} tokens, not {SIZE}; add text.")
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    tokenizer.pre_tokenizer = _splitter(" ?")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")


_SPACE = "\u0120"  # how byte-level BPE writes a space


def _splitter(space: str) -> pre_tokenizers.PreTokenizer:
    # ExecuTorch's C++ tokenizer reads Split and ByteLevel (and no Metaspace).
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES % space), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
