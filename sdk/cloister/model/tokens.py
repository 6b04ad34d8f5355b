"""What a model's own files say about tokens: text and ids, the template, what begins and ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Tokens", "read"]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenizer and its template as text, and the tokens that a model's makers named."""

    tokenizer: str = field(repr=False)  # the contents of tokenizer.json, every added token in it
    template: str | None = field(repr=False)
    special_tokens: Mapping[str, str]  # by the name that templates use: bos_token, eos_token, ...
    bos: int | None
    eos: tuple[int, ...]

    def check(self, rows: int, name: str) -> None:
        """Raise unless the model `name`, whose embedding has `rows`, can use them."""
        raise NotImplementedError


def read(source: Path) -> Tokens:
    """Read the Hugging Face directory `source`, as transformers would."""
    raise NotImplementedError
