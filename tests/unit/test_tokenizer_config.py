"""What React Native's package is given says the bundle's prompts without being told the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from cloister.errors import TokenizerError
from cloister.tokenizer_config import tokenizer_config


@dataclass(frozen=True)
class Named:
    bos: int | None = 0
    eos: tuple[int, ...] = (1, 2)
    special_tokens: dict[str, str] | None = None
    media: None = None


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.train_from_iterator(["a b"], trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<|eot|>"], show_progress=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def written(vocabulary: Path, template: str) -> Path:
    path = vocabulary.with_name("chat_template.jinja")
    path.write_text(template, "utf-8")
    return path


def test_tokens_that_a_template_names_are_set_in_it(vocabulary: Path) -> None:
    template = written(vocabulary, "\n{{ bos_token }}{{ messages[0].content }}{{ pad_token }}!")
    named = Named(special_tokens={"bos_token": '<"s\\n">', "eos_token": "</s>"})
    found = tokenizer_config(vocabulary, template, named)
    assert (found["bos_token"], found["eos_token"]) == ('<"s\\n">', "</s>")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    said = environment.from_string(str(found["chat_template"])).render(
        messages=[{"content": "hi"}], bos_token="another")
    assert said == '\n<"s\\n">hi!'


def test_of_several_ends_it_says_the_one_that_the_template_writes(vocabulary: Path) -> None:
    template = written(
        vocabulary, "{% for m in messages %}{{ m.content + '<|eot|>' }}{% endfor %}")
    assert tokenizer_config(vocabulary, template, Named())["eos_token"] == "<|eot|>"
    refusing = written(vocabulary, "{{ raise_exception('no') }}")
    assert tokenizer_config(vocabulary, refusing, Named())["eos_token"] == "</s>"


def test_without_a_template_there_is_none(vocabulary: Path) -> None:
    found = tokenizer_config(vocabulary, None, Named())
    assert "chat_template" not in found
    assert (found["bos_token"], found["eos_token"]) == ("<s>", "</s>")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError):
        tokenizer_config(tmp_path / "tokenizer.json", None, Named())
