"""ExecuTorch's stock C++ runner behind lines of JSON, with XNNPACK's weights cache on.

    asks  {"new": [PROGRAM, TOKENIZER]} | {"encode": TEXT} | {"reset": true}
          | {"generate": TEXT, "most": TOKENS, "temperature": T, "echo": B}
    says  {"piece": BYTES}, and waits for {"stop": B} | {"done": VALUE} | {"failed": TEXT}

A piece is the bytes of one token in Base64, which need not be whole characters.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pytorch_tokenizers import CppHFTokenizer
from tests.phone.runner import begin, encoded


def main() -> None:
    """Answer until there is nothing more to read."""
    llm, says = begin()

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
        say(piece=encoded(text))
        if json.loads(sys.stdin.readline())["stop"]:
            runner.stop()

    config = llm.GenerationConfig(
        max_new_tokens=ask["most"], temperature=ask["temperature"], echo=ask["echo"])
    runner.generate(ask["generate"], config, piece, lambda stats: counts.extend(
        (stats.num_prompt_tokens, stats.num_generated_tokens)))
    return counts


if __name__ == "__main__":
    main()
