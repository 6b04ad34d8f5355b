"""Whether a tokenizer works on a phone: ExecuTorch's own, in C++, is tried on its file.

In a process of its own, since what it stumbles over it says on standard error only.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import tokenizers

from cloister.errors import TokenizerError
from cloister.message import Message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloister.tokenizer import Tokenizer

__all__ = ["complaint"]

_PROGRAM = """
import json, sys
from pytorch_tokenizers import CppHFTokenizer
path, texts = json.load(sys.stdin)
phone = CppHFTokenizer()
phone.load(path)
print(json.dumps([list(phone.encode(text, 0, 0)) for text in texts]))
"""
_TEXTS = (
    "Two  spaces,\n\nand lines.", "don't 1234 na\u00efve caf\u00e9 \u4f60\u597d \U0001f980", " x",
    "a\tb\r\n",
)
_TIMEOUT_S = 120


def complaint(tokenizer_json: Path, tokenizer: Tokenizer, prompts: Sequence[str]) -> str | None:
    """Return what phones cannot do with `tokenizer_json`, which is `tokenizer`'s; None if nothing.

    Tried on `prompts`, plain and laid out by the chat template.
    """
    texts = [*_TEXTS, *prompts]
    with contextlib.suppress(TokenizerError):  # then the plain texts remain
        texts += [tokenizer.render([Message(role="user", content=text)]) for text in prompts]
    host = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    host.no_padding()
    host.no_truncation()
    try:
        run = subprocess.run(
            [sys.executable, "-c", _PROGRAM], input=json.dumps([str(tokenizer_json), texts]),
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        found: list[list[int]] = json.loads(run.stdout)
    except (OSError, subprocess.TimeoutExpired):
        return "their tokenizer could not be tried"
    except ValueError:
        part = re.search(r"Unsupported (\w+) type: (\w+)", run.stderr)
        return f"their tokenizer has no {part[1]} {part[2]}" if part else (
            "their tokenizer cannot read it")
    other = sum(
        host.encode(text, add_special_tokens=False).ids != ids
        for text, ids in zip(texts, found, strict=True)
    )
    return f"their tokenizer gives other ids for {other} of {len(texts)} texts" if other else None
