"""The texts of single tokens, as people read them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cloister.bundle import Bundle
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Spelling"]


class Spelling:
    """What the tokens of a bundle's tokenizer stand for.

    Raises:
        BundleError: see `Bundle.open`.
        TokenizerError: the tokenizer cannot be read.
    """

    def __init__(self, path: Path) -> None:
        bundle = Bundle.open(path)
        self._tokenizer = Tokenizer.from_files(
            bundle.tokenizer_path, bundle.template_path, bundle.manifest)
        self._named = {token["id"]: token["content"]
                       for token in json.loads(self._tokenizer.definition)["added_tokens"]}

    def text(self, id_: int) -> str:
        """Return what a token adds to the text before it; of a control token its name."""
        once, twice = (self._tokenizer.decode([id_] * count) for count in (1, 2))
        # Some tokenizers leave out the space before a text's first token.
        return twice[len(once):] or self._named.get(id_, "")
