"""The tokenizer that is made of a GGUF file's metadata gives the ids of the model's own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.unit.model.gguf_files import SPECIAL, TEXTS, byte_level
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from cloister.model import gguf_tokens
from cloister.model.gguf_file import Header

SPACE = "\u2581"
PIECES = (
    "the", " weather", "What's", "DON'T", "1234567", "3.14", "caf\u00e9", "cafe\u0301",
    "\u4f60\u597d", "x**2", "  ", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\U0001f980", "(a,b)",
    "...", "\u0661\u0662", "\u00bd", "_", "\u00df", "A\u0130", "\u202f", "$%^", "=>", "'s",
    "\ufeff",
)


def texts(count: int = 400) -> list[str]:
    rng = random.Random(5)
    return [*TEXTS, *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count))]


def made(metadata: dict[str, Any]) -> Tokenizer:
    header = Header(path=Path("a.gguf"), tensors={}, metadata={
        "general.architecture": "llama", **metadata})
    return Tokenizer.from_str(gguf_tokens.read(header).tokenizer)


def check(ours: Tokenizer, theirs: Any) -> None:
    for text in texts():
        wanted = theirs(text)["input_ids"]
        assert ours.encode(text).ids == wanted, text
        assert ours.decode(wanted, skip_special_tokens=False) == theirs.decode(wanted), text


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "smollm", "llama-bpe"])
def test_a_byte_level_vocabulary_cuts_as_its_name_says(pre: str) -> None:
    model = json.loads(byte_level(600).to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    ours = made({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.add_bos_token": False,
    })
    kind = transformers.Qwen2Tokenizer if pre == "qwen2" else transformers.GPT2Tokenizer
    theirs = kind(vocab=vocabulary, merges=merges, unk_token=None, bos_token=None,
                  eos_token="<|end|>", pad_token=None, add_prefix_space=False)
    theirs.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    if pre == "smollm":  # as in the model's tokenizer.json
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    elif pre == "llama-bpe":
        theirs.backend_tokenizer.pre_tokenizer = split_by(LLAMA3)
        theirs.backend_tokenizer.model.ignore_merges = True
    check(ours, theirs)


def sentencepiece() -> dict[str, Any]:
    """The metadata of a BPE vocabulary of SentencePiece's kind, with a byte for every other."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS[:2] * 3 + TEXTS[4:] * 3, trainers.BpeTrainer(
        vocab_size=200, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def merges_of(metadata: dict[str, Any], order: Any) -> list[tuple[str, str]]:
    """Every way to make a piece out of two, in the order of the pieces."""
    tokens = metadata["tokenizer.ggml.tokens"]
    pieces = set(tokens[259:])
    found = [
        (order(tokens.index(piece)), tokens.index(piece[:cut]), piece[:cut], piece[cut:])
        for piece in pieces for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def test_a_vocabulary_of_sentencepiece_is_the_tokenizer_of_llama_2() -> None:
    metadata = sentencepiece()
    tokens = metadata["tokenizer.ggml.tokens"]
    theirs = transformers.LlamaTokenizer(
        vocab={token: id_ for id_, token in enumerate(tokens)},
        merges=merges_of(metadata, lambda id_: -metadata["tokenizer.ggml.scores"][id_]),
        add_bos_token=True)
    # As in the model's tokenizer.json: also behind a special token a space is put first.
    theirs.backend_tokenizer.pre_tokenizer = None
    theirs.backend_tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    ours = made(metadata)
    check(ours, theirs)
    assert ours.encode("the</s>the").ids == theirs("the</s>the")["input_ids"]
    assert ours.encode("the").ids[0] == 1  # begins with <s>, unless the file says otherwise
    plain = made({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert plain.encode("the").ids == ours.encode("the").ids[1:]


def test_a_vocabulary_of_gemma_is_its_tokenizer() -> None:
    metadata = sentencepiece()
    tokens = [*metadata["tokenizer.ggml.tokens"], "\n\n", SPACE * 2, SPACE * 3, SPACE * 4, "<b>"]
    types = [*metadata["tokenizer.ggml.token_type"], 4, 4, 4, 4, 4]
    theirs = transformers.GemmaTokenizer(
        vocab={token: id_ for id_, token in enumerate(tokens)},
        merges=merges_of({"tokenizer.ggml.tokens": tokens}, lambda id_: id_),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        mask_token="<unk>", add_bos_token=True)
    theirs.add_tokens([transformers.AddedToken(token, normalized=False, special=False)
                       for token in ("\n\n", "<b>")])
    ours = made({
        **metadata, "general.architecture": "gemma3", "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": [token.replace(SPACE, " ") if types[id_] == 4 else token
                                  for id_, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [*metadata["tokenizer.ggml.scores"], *[-1000.0] * 5],
    })
    check(ours, theirs)
