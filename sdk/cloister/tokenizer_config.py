"""The `tokenizer_config.json` that react-native-executorch lays prompts out by. No torch.

Of it, 0.10.2 reads `chat_template` and `eos_token` (`src/extensions/llm/utils/tokenizerConfig.ts`),
and gives the template nothing but messages, tools and whether an answer is to come.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from cloister.errors import TokenizerError
from cloister.message import Message
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from cloister.tokenizer import Named

__all__ = ["tokenizer_config"]


def tokenizer_config(
    tokenizer_json: Path, chat_template: Path | None, named: Named
) -> dict[str, object]:
    """Return the contents, for the tokenizer and template of a bundle whose tokens are `named`.

    The tokens that the template speaks of by name are set in the template itself, so that it
    writes the same where it is given none. Without a template there is no `chat_template`. Of
    several tokens that end an answer, `eos_token` is the one that the template writes.

    Raises:
        TokenizerError: a file is missing or malformed.
    """
    tokenizer = Tokenizer.from_files(tokenizer_json, chat_template, named)
    tokens = tokenizer.special_tokens
    found: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    if chat_template is not None:
        template = chat_template.read_text("utf-8")
        told = "".join(
            f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}"
            for name, token in sorted(tokens.items()) if re.search(rf"\b{name}\b", template))
        # Templates are read with `trim_blocks`: the line break after a block is not written.
        found["chat_template"] = f"{told}\n{template}" if told else template
    ends = [tokenizer.token_of(id_) for id_ in named.eos]
    if ends:
        found["eos_token"] = next((end for end in ends if end in _rendered(tokenizer)), ends[0])
    return found


def _rendered(tokenizer: Tokenizer) -> str:
    """Return a conversation as the template lays it out; empty where it refuses it."""
    messages = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    try:
        return tokenizer.render(messages, add_generation_prompt=False)
    except TokenizerError:
        return ""
