"""ExecuTorch's stock C++ runner behind lines, as on a phone: with XNNPACK's weights cache on.

    asks  new PROGRAM TOKENIZER | generate ID PROMPT SEQ_LEN ECHO TEMPERATURE | reset ID | close ID
    says  made ID | piece BYTES (and waits for `go` or `stop`) | done PROMPT GENERATED | failed TEXT

Texts are in Base64. A piece is the bytes of one token, which need not be whole characters.
"""

from __future__ import annotations

import codecs
import importlib.util
import os
import sys
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, TextIO

import torch

from cloister.runtime import _executorch


def stock() -> Any:
    """Return the runner's module, without its package, whose import takes seconds more."""
    bindings = Path(_executorch._bindings().__file__)
    path = next(bindings.parents[1].glob("llm/runner/_llm_runner*.so"))
    spec = importlib.util.spec_from_file_location("_llm_runner", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def begin() -> tuple[Any, TextIO]:
    """Return the runner's module, and where to say lines: it prints every piece itself."""
    torch.set_num_threads(1)
    # The bindings decode each piece strictly; so bytes of half a character come through as well.
    codecs.register_error("strict", codecs.lookup_error("surrogateescape"))
    _executorch.share_weights()
    says = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return stock(), says


def encoded(text: str) -> str:
    """Return the bytes of a text in Base64; those of half a character, too."""
    return b64encode(text.encode("utf-8", "surrogateescape")).decode()


def main() -> None:
    """Answer until there is nothing more to read."""
    (llm, says), runners = begin(), list[Any]()

    def say(*words: object) -> None:
        says.write(" ".join(map(str, words)) + "\n")
        says.flush()

    for line in sys.stdin:
        what, *rest = line.split()
        if what == "new":
            try:
                runners.append(llm.TextLLMRunner(*(b64decode(path).decode() for path in rest)))
                say("made", len(runners) - 1)
            except RuntimeError as error:
                say("failed", encoded(str(error)))
            continue
        id_ = int(rest[0])
        if what == "close":
            runners[id_] = None
            continue
        runner = runners[id_]
        if what == "reset":
            runner.reset()
            continue
        prompt, (seq_len, echo, temperature) = b64decode(rest[1]).decode(), rest[2:]

        def piece(text: str, runner: Any = runner) -> None:
            say("piece", encoded(text))
            if sys.stdin.readline() == "stop\n":
                runner.stop()

        config = llm.GenerationConfig(
            seq_len=int(seq_len), echo=echo == "true", temperature=float(temperature))
        try:
            runner.generate(prompt, config, piece, lambda stats: say(
                "done", stats.num_prompt_tokens, stats.num_generated_tokens))
        except RuntimeError as error:
            say("failed", encoded(f"{error}: {prompt}"))


if __name__ == "__main__":
    main()
