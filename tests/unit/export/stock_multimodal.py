"""Asks ExecuTorch's stock MultimodalRunner, in a process of its own: it prints what it says.

Reads a program, a tokenizer and conversations of texts, pictures and recordings as JSON; writes the
answers, bytes in hex.
"""

from __future__ import annotations

import codecs
import json
import os
import sys

import torch
from tests.phone.runner import stock

from cloister.runtime import _executorch

if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as found:
        os.dup2(2, 1)
        # The bindings decode each piece strictly, and a token may end within a character.
        codecs.register_error("strict", codecs.lookup_error("surrogateescape"))
        _executorch._bindings()
        llm, asked = stock(), json.load(sys.stdin)
        answers = []
        for conversation in asked["conversations"]:
            runner = llm.MultimodalRunner(asked["program"], asked["tokenizer"], None)
            inputs = []
            for kind, content in conversation:
                if kind == "text":
                    inputs.append(llm.make_text_input(content))
                elif kind == "picture":
                    inputs.append(llm.make_image_input(torch.tensor(content, dtype=torch.uint8)))
                else:
                    inputs.append(llm.make_audio_input(torch.tensor([[content]])))
            pieces = list[str]()
            config = llm.GenerationConfig(
                max_new_tokens=asked["tokens"], temperature=0.0, echo=False)
            runner.generate(inputs, config, pieces.append)
            answers.append("".join(pieces).encode("utf-8", "surrogateescape").hex())
        json.dump(answers, found)
