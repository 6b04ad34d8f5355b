"""The tokenizer of the reference family: byte-level BPE with 4096 entries."""

from __future__ import annotations

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
# A tool call's fixed parts, each of which may become one token, and so may a label. Then one digit
# at a time, so that numbers are spelled alike wherever they stand; words with the space before
# them; runs of punctuation.
_PIECES = (
    r'\{"name": "\w+", "arguments": \{(?:\}\})?|"(?:, ")?\w+": "|"\}\}| ?\[[A-Z]+\]'
    r"|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
)


def train(directory: Path, texts: Iterable[str]) -> None:
    """Write `tokenizer.json` and `chat_template.jinja`, trained on `texts`.

    The same texts give the same files.

    Raises:
        DataError: the texts are too few for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    # ExecuTorch's C++ tokenizer reads Split and ByteLevel (and no Metaspace).
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    if tokenizer.get_vocab_size() != SIZE:
        raise DataError(
            f"The texts give {tokenizer.get_vocab_size()} tokens, not {SIZE}; add text."
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
