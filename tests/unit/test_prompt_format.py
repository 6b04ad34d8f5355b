"""A chat template is said in strings where that gives its very ids, and not otherwise."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from cloister import prompt_format
from cloister.manifest import Around, PromptFormat
from cloister.message import Message
from cloister.reference.vocabulary import TEMPLATE
from cloister.tokenizer import Tokenizer

SPECIAL = (
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>",
    "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]",
)
ANSWER = "{% if add_generation_prompt %}ANSWER{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + ANSWER.replace("ANSWER", "{{ '<|im_start|>assistant\n' }}")
)
QWEN_25 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    + ANSWER.replace("ANSWER", "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    + ANSWER.replace("ANSWER", "{{ '<start_of_turn>model\n' }}")
)
GEMMA_3 = (
    "{{ '<bos>' }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m.content"
    " + '<end_of_turn>\n' }}{% endfor %}"
    + ANSWER.replace("ANSWER", "{{ '<start_of_turn>model\n' }}")
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
THINKING = CHATML.replace(
    "m.content", "(m.content.split('</think>')[-1] if not loop.last else m.content | trim)"
)
SAYABLE = {
    "reference": (TEMPLATE, "", "<|assistant|>", "<|system|>", False),
    "chatml": (CHATML, "", "<|im_start|>assistant\n", "<|im_start|>system\n", False),
    "qwen-2.5": (QWEN_25, "<|im_start|>system\nYou help.<|im_end|>\n", "<|im_start|>assistant\n",
                 "<|im_start|>system\n", False),
    "llama-3": (LLAMA_3, "<|begin_of_text|>", "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", True),
    "gemma": (GEMMA, "<bos>", "<start_of_turn>model\n", None, True),
    "mistral": (MISTRAL, "<s>", "", None, False),
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["two words and lines\n\nbetween"], trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    backend.save(str(path))
    return path


def written(vocabulary: Path, directory: Path, template: str) -> Tokenizer:
    (directory / "tokenizer.json").write_bytes(vocabulary.read_bytes())
    (directory / "chat_template.jinja").write_text(template, "utf-8")
    return Tokenizer.from_files(directory / "tokenizer.json", directory / "chat_template.jinja")


@pytest.mark.parametrize("name", SAYABLE)
def test_a_template_that_strings_can_say_is_said(
    vocabulary: Path, tmp_path: Path, name: str
) -> None:
    template, begin, answer, system, strip = SAYABLE[name]
    tokenizer = written(vocabulary, tmp_path, template)
    found, reason = prompt_format.derive(tokenizer, tmp_path)
    assert reason is None
    assert found is not None
    assert (found.begin, found.answer, found.strip) == (begin, answer, strip)
    assert (found.system and found.system.before) == system
    messages = [Message(role="user", content="  and so\n"), Message(role="assistant", content="no"),
                Message(role="user", content="why?")]
    if system:
        messages.insert(0, Message(role="system", content="be brief"))
    plain = Backend.from_file(str(vocabulary))
    ids = plain.encode(prompt_format.assemble(found, messages), add_special_tokens=False).ids
    assert ids == tokenizer.encode_chat(messages)


@pytest.mark.parametrize(("template", "said"), [
    (GEMMA_3, "folds the system message"),
    (CHATML.replace("{% for", "{{ strftime_now('%d') }}{% for", 1), "clock"),
    (CHATML.replace("m.content", "(m.content | trim if m.role == 'user' else m.content)"),
     "changes some texts"),
    (THINKING, "changes some texts"),
    (CHATML.replace("m.content", "m.content | upper"), "changes a message"),
    (CHATML.replace("m.role", "m.role + (loop.index | string)"), "first turn"),
    (CHATML.replace("m.content", "m.content + ('!' if loop.last else '')"),
     "ends a message in another way"),
    ("{{ raise_exception('never') }}", "refuses a conversation"),
    ("{% for m in messages %}{{ m.content }}{% if m.content | length > 9 %}!{% endif %}"
     "{% endfor %}", "changes some texts"),
])
def test_a_template_that_strings_cannot_say_has_none_and_the_reason(
    vocabulary: Path, tmp_path: Path, template: str, said: str
) -> None:
    found, reason = prompt_format.derive(written(vocabulary, tmp_path, template), tmp_path)
    assert found is None
    assert reason is not None
    assert said in reason


def test_without_a_template_the_plain_layout_is_said(vocabulary: Path, tmp_path: Path) -> None:
    written(vocabulary, tmp_path, "")
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_files(tmp_path / "tokenizer.json", None)
    found, _ = prompt_format.derive(tokenizer, tmp_path)
    assert found is not None
    assert found.user == Around(before="user: ", after="\n")


@pytest.mark.parametrize("change", [
    {"begin": "x"}, {"system": None, "user": Around(before="<|user|> ", after="<|end|>")},
    {"answer": "<|user|>"}, {"strip": True},
    {"system": Around(before="<|system|>", after="<|end|>\n")},
    {"assistant": Around(before="<|assistant|>", after="")},
])
def test_any_other_string_is_found_out(
    vocabulary: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    tokenizer = written(vocabulary, tmp_path, TEMPLATE)
    found, _ = prompt_format.derive(tokenizer, tmp_path)
    assert isinstance(found, PromptFormat)
    assert prompt_format.prove(found, tokenizer, tmp_path)
    other = msgspec.structs.replace(found, **change)
    assert not prompt_format.prove(other, tokenizer, tmp_path)


def test_special_ids_are_those_that_are_no_text(vocabulary: Path) -> None:
    assert prompt_format.special_ids(vocabulary.parent) == tuple(range(len(SPECIAL)))
