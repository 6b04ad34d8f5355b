"""Conversations by our Jinja, by our strings, and by the Jinja of React Native's package.

Laid out by a bundle's template, and by those that others made: out of TRL's wheel on PyPI
(Apache-2.0), whose code is not run. Those are of models that TRL trains, character for character.
"""

from __future__ import annotations

import json
import operator
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import msgspec
import platformdirs
import pytest
from tests.phone import npm

from cloister import prompt_format
from cloister.bundle import Bundle
from cloister.errors import TokenizerError
from cloister.message import Message
from cloister.tokenizer import Tokenizer
from cloister.tokenizer_config import tokenizer_config

_WHEEL = "trl-1.16.0-py3-none-any.whl"
_SHA256 = "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
# By name: the tokens that the template is given.
THEIRS = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "phi3": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    "phi3_5": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    "qwen2_5": {"eos_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "cohere": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
    "lfm2": {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"},
    "glm4moe": {"eos_token": "<|user|>"},
}


TEXTS = (
    "Is it cold?", "  spaces around ", "\n\nlines\nbetween\n", "3 + 4 = 7",
    "na\u00efve caf\u00e9 \u4f60\u597d", "{{ braces }} {% raw %}",
    "a 'quote' and a \"second\" one \\n", "\U0001f980", "<b>tag</b>", "x",
)
CONVERSATIONS = [
    [Message(role="system", content=TEXTS[-number % len(TEXTS)])] * (number % 2) + [
        Message(role="assistant" if place % 2 else "user",
                content=TEXTS[(number + place) % len(TEXTS)])
        for place in range(1 + 2 * (number % 4))]
    for number in range(20)
]


def agreement(bundle: Bundle) -> dict[str, tuple[int, int, int, int]]:
    """Return by template how many conversations it lays out, and on how many both Jinjas agree.

    A refusal by both counts as one. Then how many our strings say, and how many of them rightly.
    """
    assert bundle.template_path is not None
    named = {"the bundle's": (bundle.template_path.read_text("utf-8"), None)}
    named |= {name: (text, THEIRS[name]) for name, text in theirs().items()}
    with tempfile.TemporaryDirectory() as folder:
        ours = [_laid_out(bundle, *each, Path(folder, str(place)))
                for place, each in enumerate(named.values())]
    conversations = [[{"role": message.role, "content": message.content} for message in each]
                     for each in CONVERSATIONS]
    done = subprocess.run(
        ["node", Path(__file__).parent / "react_native" / "render.cjs", npm.modules()], text=True,
        capture_output=True, check=True, input=json.dumps(
            [{"template": each[0], "conversations": conversations} for each in ours]))
    return {
        name: (sum(text is not None for text in laid), sum(map(operator.eq, laid, rendered)),
               sum(text is not None for text in told),
               sum(text == there for text, there in zip(told, laid, strict=True)
                   if text is not None))
        for name, (_, rendered, told), laid in zip(
            named, ours, json.loads(done.stdout), strict=True)}


def _laid_out(
    bundle: Bundle, template: str, tokens: Mapping[str, str] | None, folder: Path
) -> tuple[str, list[str | None], list[str | None]]:
    """The template as the package is given it, and what it and the prompt format write by us."""
    folder.mkdir()
    shutil.copy(bundle.tokenizer_path, folder)
    path = folder / "chat_template.jinja"
    path.write_text(template, "utf-8")
    named = bundle.manifest
    if tokens is not None:
        named = msgspec.structs.replace(named, special_tokens=tokens)
    tokenizer = Tokenizer.from_files(folder / "tokenizer.json", path, named)
    format_, _ = prompt_format.derive(tokenizer, folder)

    def render(messages: list[Message]) -> str | None:
        try:
            return tokenizer.render(messages)
        except TokenizerError:
            return None

    def tell(messages: list[Message]) -> str | None:
        if format_ is None or (format_.system is None and messages[0].role == "system"):
            return None
        return prompt_format.assemble(format_, messages)

    config = tokenizer_config(folder / "tokenizer.json", path, named)
    return (str(config["chat_template"]), [render(each) for each in CONVERSATIONS],
            [tell(each) for each in CONVERSATIONS])


@cache
def theirs() -> dict[str, str]:
    """Return the templates by name, fetched once into the tests' cache."""
    given = os.environ.get("CLOISTER_TEST_CACHE")
    folder = Path(given) if given else platformdirs.user_cache_path("cloister-tests", False)
    if not (folder / _WHEEL).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            wanted = Path(work, "requirements.txt")
            wanted.write_text(f"trl==1.16.0 --hash=sha256:{_SHA256}\n")
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
                 "--disable-pip-version-check", "--dest", work, "--requirement", str(wanted)],
                capture_output=True, text=True, timeout=540)
            if done.returncode:
                pytest.fail(f"pip could not fetch {_WHEEL}: {done.stderr.strip()[-300:]}")
            Path(work, _WHEEL).replace(folder / _WHEEL)
    with zipfile.ZipFile(folder / _WHEEL) as wheel:
        return {name: wheel.read(f"trl/chat_templates/{name}.jinja").decode() for name in THEIRS}
