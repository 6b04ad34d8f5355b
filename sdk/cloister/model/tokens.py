"""What a model's own files say about tokens: text and ids, the template, what begins and ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from cloister.errors import CheckpointError, VocabularyMismatch
from cloister.model.shards import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        _check(self.tokenizer, rows, name)


def read(source: Path) -> Tokens:
    """Read the Hugging Face directory `source`, as transformers would."""
    bos, eos = _special(source)
    template = _template(source)
    read_json(source / "tokenizer.json")
    return Tokens(
        tokenizer=(source / "tokenizer.json").read_text("utf-8"),
        template=template.read_text("utf-8") if isinstance(template, Path) else template,
        special_tokens={}, bos=bos, eos=eos)


def _check(text: str, rows: int, name: str) -> None:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # as the library raises it, for whatever it cannot read
        raise CheckpointError(
            f"The tokenizer of {name} is not one that Cloister can read; copy it again."
        ) from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= rows:
        raise VocabularyMismatch(
            f"The tokenizer of {name} has ids up to {highest} and the model {rows} rows; "
            "use the tokenizer that the model was trained with."
        )


def _special(source: Path) -> tuple[int | None, tuple[int, ...]]:
    """Return begin and end token ids; generation_config.json overrides config.json."""
    fields: dict[str, Any] = {}
    for file in ("config.json", "generation_config.json"):
        if (source / file).exists():
            record = read_json(source / file)
            fields |= {name: value for name, value in record.items() if value is not None}
    bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id", [])
    ends = eos if isinstance(eos, list) else [eos]
    if any(type(id_) is not int or id_ < 0 for id_ in (*ends, 0 if bos is None else bos)):
        raise CheckpointError(
            f"The bos_token_id or eos_token_id of {source.name} is no token id; copy it again."
        )
    return bos, tuple(ends)


def _template(source: Path) -> Path | str | None:
    path = source / "chat_template.jinja"
    if path.exists():
        return path
    config = source / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    return template if isinstance(template, str) else None
