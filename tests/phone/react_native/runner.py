"""ExecuTorch's stock C++ runner behind lines of JSON, with XNNPACK's weights cache on.

    asks  {"new": [PROGRAM, TOKENIZER]} | {"encode": TEXT} | {"reset": true}
          | {"generate": TEXT, "most": TOKENS, "temperature": T, "echo": B}
    says  {"piece": BYTES}, and waits for {"stop": B} | {"done": VALUE} | {"failed": TEXT}

A piece is the bytes of one token in Base64, which need not be whole characters.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import os
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import torch
from pytorch_tokenizers import CppHFTokenizer

from cloister.runtime import _executorch


def main() -> None:
    """Answer until there is nothing more to read."""
    torch.set_num_threads(1)
    # The bindings decode each piece strictly; so bytes of half a character come through as well.
    codecs.register_error("strict", codecs.lookup_error("surrogateescape"))
    bindings = _executorch._bindings()
    _executorch.share_weights()
    path = next(Path(bindings.__file__).parents[1].glob("llm/runner/_llm_runner*.so"))
    spec = importlib.util.spec_from_file_location("_llm_runner", path)
    assert spec and spec.loader
    llm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llm)
    says = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the runner prints each piece

    def say(**words: object) -> None:
        says.write(json.dumps(words) + "\n")
        says.flush()

    runner: Any = None
    plain = CppHFTokenizer()
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if "new" in ask:
                runner = llm.TextLLMRunner(*ask["new"])
                plain.load(ask["new"][1])
                say(done=None)
            elif "encode" in ask:
                say(done=len(plain.encode(ask["encode"], 0, 0)))
            elif "reset" in ask:
                runner.reset()
                say(done=None)
            else:
                say(done=generate(llm, runner, ask, say))
        except RuntimeError as error:
            say(failed=f"{error}: {line}")


def generate(llm: Any, runner: Any, ask: dict[str, Any], say: Any) -> list[int]:
    """Return how many tokens of the prompt and of the answer the model has read."""
    counts: list[int] = []

    def piece(text: str) -> None:
        say(piece=b64encode(text.encode("utf-8", "surrogateescape")).decode())
        if json.loads(sys.stdin.readline())["stop"]:
            runner.stop()

    config = llm.GenerationConfig(
        max_new_tokens=ask["most"], temperature=ask["temperature"], echo=ask["echo"])
    runner.generate(ask["generate"], config, piece, lambda stats: counts.extend(
        (stats.num_prompt_tokens, stats.num_generated_tokens)))
    return counts


if __name__ == "__main__":
    main()
