"""Small tokenizers and chat templates in the styles of the models that people have.

Written for the tests: the vocabularies are trained on a few lines, the templates have the shapes of
those that are published.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

Conversation = list[dict[str, str]]

_LINES = [
    "hello there, how are you today?", "the quick brown fox jumps over the lazy dog",
    "user and assistant and system and model", "What is 7 times 8? It is 56.\n\nNow 1, 2, 3.",
    "def main():\n    return {\"name\": 'x'}\n", "na\u00efve caf\u00e9 \u4f60\u597d \u4e16\u754c",
    "  two  spaces   three", "Task: be brief. Answer: yes, no, maybe",
] * 3
_SPACE = "\u2581"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def special(*tokens: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(token, **{"special": True, "normalized": False, **flags})
            for token in tokens]


def byte_level(tokens: list[AddedToken], *, split: bool = False) -> Tokenizer:
    """GPT-2's, Qwen's and SmolLM's kind; with `split` Llama 3's."""
    backend = Tokenizer(models.BPE(ignore_merges=split))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    backend.pre_tokenizer = level if not split else pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_GPT2), "isolated"), level])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(_LINES, trainers.BpeTrainer(
        vocab_size=400, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_tokens(tokens)
    return backend


def _pieces(tokens: list[AddedToken]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of words that begin with a low line, as SentencePiece makes them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", *(token.content for token in tokens), *_BYTES]
    for piece in sorted(model["vocab"], key=model["vocab"].__getitem__):
        if piece not in names:
            names.append(piece)
    return {name: id_ for id_, name in enumerate(names)}, [tuple(m) for m in model["merges"]]


def sentence_pieces(tokens: list[AddedToken], scheme: str | None) -> Tokenizer:
    """BPE over pieces; `scheme` is Metaspace's, or None for the older normalizer."""
    vocabulary, merges = _pieces(tokens)
    backend = Tokenizer(models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    backend.add_tokens(special("<unk>") + tokens)
    return backend


def gemma(tokens: list[AddedToken]) -> Tokenizer:
    """Gemma's kind: spaces become low lines, and runs of white space are tokens of their own."""
    runs = ["\n\n", "\n\n\n", _SPACE * 2, _SPACE * 3]
    vocabulary, merges = _pieces(
        [*tokens, *(AddedToken(run, normalized=False) for run in runs)])
    backend = Tokenizer(models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens(
        special("<unk>") + tokens + [AddedToken(run, normalized=False) for run in runs])
    return backend


def unigram(tokens: list[AddedToken]) -> Tokenizer:
    """Unigram, whose vocabulary has the control tokens among its pieces."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_LINES, trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]))
    learnt = [tuple(row) for row in json.loads(trained.to_str())["model"]["vocab"]]
    names = [(token.content, 0.0) for token in tokens]
    backend = Tokenizer(models.Unigram(
        [("<unk>", 0.0), *names, *((byte, -20.0) for byte in _BYTES),
         *(row for row in learnt if row[0] != "<unk>")], unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(
        Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    backend.add_tokens(special("<unk>") + tokens)
    return backend


def flagged() -> Tokenizer:
    """Added tokens with every flag, before a normalizer that changes them."""
    backend = byte_level(special("<|im_start|>", rstrip=True) + special("<|im_end|>", lstrip=True))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.add_tokens([
        AddedToken("<Think>", normalized=True), AddedToken("word", single_word=True),
        AddedToken("<both>", lstrip=True, rstrip=True), AddedToken("<plain>", normalized=False),
    ])
    return backend


def beginning(backend: Tokenizer, token: str) -> Tokenizer:
    """The same, putting `token` before every text."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, backend.token_to_id(token))])
    return backend


_ANSWER = "{% if add_generation_prompt %}{{ ANSWER }}{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}" + _ANSWER.replace("ANSWER", "'<|im_start|>assistant\n'")
)
SMOLLM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
QWEN = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}\n"
    "    {%- for tool in tools %}\n        {{- '\\n' }}\n        {{- tool | tojson }}\n"
    "    {%- endfor %}\n    {{- '\\n</tools><|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- set content = message.content %}\n"
    "    {%- if message.role == 'assistant' and '</think>' in content %}\n"
    "        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    + _ANSWER.replace("ANSWER", "'<|start_header_id|>assistant<|end_header_id|>\n\n'")
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + "
    "'\n<</SYS>>\n\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    + _ANSWER.replace("ANSWER", "'<start_of_turn>model\n'")
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (first if loop.first else '') }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    + _ANSWER.replace("ANSWER", "'<start_of_turn>model\n'")
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}" + _ANSWER.replace("ANSWER", "'<\uff5cAssistant\uff5c><think>\n'")
)
_SENTENCE = ("<s>", "</s>")
_IM = ("<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
          "<|eot_id|>")
_DEEP = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
         "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_THINK = [AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool_call>")]


def _named(bos: str | None, eos: str, **more: str) -> dict[str, Any]:
    return {"bos_token": bos, "eos_token": eos, **more}


# By its name: what makes the tokenizer, its template, and the tokens that its files name.
STYLES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "chatml": (lambda: byte_level(special(*_IM)), CHATML, _named(None, "<|im_end|>")),
    "smollm": (lambda: byte_level(special("<|endoftext|>", *_IM)), SMOLLM,
               _named("<|im_start|>", "<|im_end|>", pad_token="<|im_end|>")),
    "qwen": (lambda: byte_level(special("<|endoftext|>", *_IM) + _THINK), QWEN,
             _named(None, "<|im_end|>", pad_token="<|endoftext|>")),
    "hermes": (lambda: byte_level([AddedToken(token, normalized=False) for token in _IM]), CHATML,
               _named(None, "<|im_end|>")),
    "llama-3": (lambda: beginning(byte_level(special(*_LLAMA), split=True), "<|begin_of_text|>"),
                LLAMA_3, _named("<|begin_of_text|>", "<|eot_id|>")),
    "llama-2": (lambda: beginning(sentence_pieces(special(*_SENTENCE), None), "<s>"), LLAMA_2,
                _named(*_SENTENCE, unk_token="<unk>")),
    "llama-2-first": (lambda: beginning(sentence_pieces(special(*_SENTENCE), "first"), "<s>"),
                      LLAMA_2, _named(*_SENTENCE, unk_token="<unk>")),
    "mistral-first": (lambda: sentence_pieces(special(*_SENTENCE, "[INST]", "[/INST]"), "first"),
                      MISTRAL, _named(*_SENTENCE)),
    "mistral-always": (lambda: sentence_pieces(special(*_SENTENCE), "always"), MISTRAL,
                       _named(*_SENTENCE)),
    "mistral-never": (lambda: sentence_pieces(special(*_SENTENCE), "never"), MISTRAL,
                      _named(*_SENTENCE)),
    "zephyr": (lambda: sentence_pieces(special(*_SENTENCE), None), ZEPHYR,
               _named(*_SENTENCE, pad_token="</s>")),
    "phi-3": (lambda: sentence_pieces(
        special(*_SENTENCE) + special(*_PHI, "<|endoftext|>", rstrip=True), None), PHI_3,
        _named("<s>", "<|endoftext|>")),
    "gemma": (lambda: beginning(gemma(special("<bos>", "<eos>", "<start_of_turn>",
                                              "<end_of_turn>")), "<bos>"), GEMMA,
              _named("<bos>", "<eos>")),
    "gemma-3": (lambda: beginning(gemma(special("<bos>", "<eos>", "<start_of_turn>",
                                                "<end_of_turn>")), "<bos>"), GEMMA_3,
                _named("<bos>", "<eos>")),
    "deepseek": (lambda: byte_level(special(*_DEEP) + _THINK), DEEPSEEK, _named(*_DEEP[:2])),
    "unigram": (lambda: unigram(special(*_SENTENCE)), ZEPHYR, _named(*_SENTENCE)),
    "flags": (flagged, CHATML, _named(None, "<|im_end|>")),
}
NO_SYSTEM = frozenset({"mistral-first", "mistral-always", "mistral-never", "gemma"})


def write(directory: Path, style: str, **config: Any) -> Path:
    """Write the tokenizer files of a style, as a model's directory has them."""
    make, template, names = STYLES[style]
    directory.mkdir(parents=True, exist_ok=True)
    make().save(str(directory / "tokenizer.json"))
    record = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names,
              **config}
    record = {key: value for key, value in record.items() if value is not ...}
    (directory / "tokenizer_config.json").write_text(json.dumps(record), "utf-8")
    (directory / "config.json").write_text("{}", "utf-8")
    return directory


_WORDS = (
    "hello", "the", "user", "model", "assistant", "word", "Think", "7", "1234", "a", "x.y",
    "\u00e9", "\u4f60\u597d", "\U0001f980", "e\u0301", "\uff21\uff22", "don't",
    "{\"k\": [1, 2]}", "<", "|>", "<|", "<|im", "</",
    "[IN", "[/INST", "&amp;", "\\n", "{{ x }}", "<b>", "_", "\u2581", "end|>", "\uff5c",
)
_GAPS = (" ", " ", " ", "", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "\n\n\n", "\u00a0")


def text(rng: random.Random, words: tuple[str, ...] = _WORDS) -> str:
    """A text of a message: words, gaps of every kind, white space at its ends."""
    parts = [rng.choice(_GAPS) if rng.random() < 0.3 else ""]
    for _ in range(rng.randint(1, 9)):
        parts += [rng.choice(words), rng.choice(_GAPS)]
    if rng.random() < 0.7:
        parts.pop()
    return "".join(parts)


def conversation(
    rng: random.Random, *, system: bool, never: Iterable[str] = (),
    words: tuple[str, ...] = _WORDS
) -> Conversation:
    """A conversation of one to five turns, after a system message or none; none spells `never`."""
    roles = ["user", "assistant"] * 3
    while True:
        turns = [{"role": role, "content": text(rng, words)}
                 for role in roles[:rng.choice([1, 1, 3, 5, 2, 4])]]
        if system and rng.random() < 0.5:
            turns.insert(0, {"role": "system", "content": text(rng, words)})
        if not any(token in turn["content"] for token in never for turn in turns):
            return turns


def controls(style: str) -> list[str]:
    """The control tokens of a style: what is special, and what its template writes."""
    make, template, _ = STYLES[style]
    return [
        token.content for token in make().get_added_tokens_decoder().values()
        if not token.content.isspace() and (token.special or token.content in template)
    ]
