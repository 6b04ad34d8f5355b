"""The tokenizer of the reference family: byte-level BPE with 4096 entries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cloister.corpus import read
from cloister.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["SPECIAL", "TEMPLATE", "texts", "train"]

SIZE = 4096
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# One digit at a time, so that numbers are spelled alike wherever they stand; words with the space
# before them; runs of punctuation.
_PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


def train(directory: Path, data: Path) -> None:
    """Write `tokenizer.json` and `chat_template.jinja`, trained on the public texts in `data`.

    The same texts give the same files.

    Raises:
        DataError: a data set is missing or malformed, or too small for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    # ExecuTorch's C++ tokenizer reads Split and ByteLevel (and no Metaspace).
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(data), trainers.BpeTrainer(
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


def texts(data: Path) -> Iterator[str]:
    """Every public training text: requests and calls, intents, tales.

    Raises:
        DataError: a data set is missing or malformed.
    """
    for example in read(data / "snips"):
        yield example.input
        yield example.target
    try:
        clinc = json.loads((data / "clinc150" / "train_val.json").read_text("utf-8"))
        for text, intent in clinc["train"] + clinc["oos_train"]:
            yield text
            yield json.dumps({"name": intent, "arguments": {}})
        tales = (data / "fairytaleqa" / "stories_train.jsonl").read_text("utf-8")
        for line in tales.split("\n"):
            if line:
                yield from json.loads(line)["sections"]
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(
            f"Data folder {data.name} lacks clinc150 or fairytaleqa, or they are malformed; "
            "see the data sets' own pages."
        ) from None
