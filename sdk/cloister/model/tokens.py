"""What a model's own files say about tokens: text and ids, the template, what begins and ends.

Read as transformers 5.24 reads them (tokenization_utils_base.py, tokenization_utils_tokenizers.py),
except that `tokenizer.json` is the tokenizer whatever `tokenizer_class` says: some of its classes
build another in place of the file's (models/gpt2/tokenization_gpt2.py keeps no other splitting than
its own), which is not the one that the model was trained with.

    tokenizer.json            the tokenizer
    tokenizer_config.json     added tokens and their flags, named tokens, templates
    special_tokens_map.json,  the same, for directories of older releases: read where
    added_tokens.json         tokenizer_config.json has no added_tokens_decoder
    chat_template.jinja, additional_chat_templates/NAME.jinja    templates; before those of
                              tokenizer_config.json, and these before chat_template.json
    generation_config.json,   begin and end token ids
    config.json
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken

from cloister.errors import CheckpointError, TokenizerError, VocabularyMismatch
from cloister.message import Message
from cloister.model.shards import read_json
from cloister.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Tokens", "check_there", "read"]

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")  # in this order they are added where the tokenizer lacks them
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_CONVERTIBLE = ("tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenizer and its template as text, and the tokens that a model's makers named."""

    tokenizer: str = field(repr=False)  # the contents of tokenizer.json, every added token in it
    template: str | None = field(repr=False)
    special_tokens: Mapping[str, str]  # by the name that templates use: bos_token, eos_token, ...
    bos: int | None
    eos: tuple[int, ...]

    def checked(self, rows: int, name: str) -> Tokens:
        """Return them with the end of a turn, for the model `name`, whose embedding has `rows`.

        The token that the template writes after an answer ends one, too.

        Raises:
            CheckpointError: the tokenizer cannot be read, or does not know an end token.
            VocabularyMismatch: there is an id beyond the embedding's rows.
            TokenizerError: the template is not valid, or lays out no conversation at all.
        """
        backend = _backend(self.tokenizer, name)
        highest = _highest(backend)
        if highest >= rows:
            raise VocabularyMismatch(
                f"The tokenizer of {name} has ids up to {highest} and the model {rows} rows; "
                "use the tokenizer that the model was trained with."
            )
        for id_ in (*self.eos, *([] if self.bos is None else [self.bos])):
            if id_ >= rows:
                raise VocabularyMismatch(
                    f"{name} names the special token {id_} and has {rows} rows; correct its "
                    "generation_config.json or config.json."
                )
        if self.eos and not any(backend.id_to_token(id_) for id_ in self.eos):
            raise CheckpointError(
                f"The tokenizer of {name} does not know the end token {self.eos[0]}; copy its "
                "tokenizer_config.json and added_tokens.json, too."
            )
        whole = Tokenizer(
            backend, self.template, special_tokens=self.special_tokens, eos=self.eos)
        _check_template(whole)
        end = whole.turn_end
        return self if end is None or end in self.eos else replace(self, eos=(*self.eos, end))


def read(source: Path, rows: int) -> Tokens:
    """Read the Hugging Face directory `source` of a model whose embedding has `rows`.

    Raises:
        CheckpointError: a file is missing or malformed.
        VocabularyMismatch, TokenizerError: see `Tokens.checked`.
    """
    check_there(source)
    read_json(source / "tokenizer.json")  # names a file that is no JSON
    bos, eos = _ids(source)
    try:
        text = (source / "tokenizer.json").read_bytes().decode("utf-8-sig")
        backend = _backend(text, source.name)
        config = _optional(source, "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # of an older release
            config |= _optional(source, "special_tokens_map.json")
        names = _names(config)
        extended = _extend(backend, source, config, names, rows)
        template = _template(source, config)
    except (TypeError, ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"The tokenizer_config.json of {source.name}, or another file of its tokenizer, is "
            "malformed; copy it again."
        ) from error
    if not config:  # nothing names a token
        for name, id_ in ("bos_token", bos), ("eos_token", next(iter(eos), None)):
            if id_ is not None and backend.id_to_token(id_) is not None:
                names[name] = AddedToken(backend.id_to_token(id_), special=True)
    special = {name: token.content for name, token in names.items()}
    if bos is None:
        bos = backend.token_to_id(special.get("bos_token", ""))
    end = backend.token_to_id(special.get("eos_token", ""))
    return Tokens(
        tokenizer=backend.to_str() if extended else text, template=template,
        special_tokens=special, bos=bos,
        eos=eos if end is None or end in eos else (*eos, end),
    ).checked(rows, source.name)


def check_there(source: Path) -> None:
    """Raise CheckpointError unless the directory `source` has a tokenizer.json."""
    if (source / "tokenizer.json").is_file():
        return
    other = next((name for name in _CONVERTIBLE if (source / name).exists()), None)
    if other is not None:
        raise CheckpointError(
            f"{source.name} has {other} and no tokenizer.json; convert it with: python -c "
            "\"from transformers import AutoTokenizer as A; "
            f"A.from_pretrained('{source.name}').save_pretrained('{source.name}')\"."
        )
    raise CheckpointError(f"{source.name} has no tokenizer.json; download that too.")


def _backend(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # as the library raises it, for whatever it cannot read
        raise CheckpointError(
            f"The tokenizer of {name} is not one that Cloister can read; copy it again."
        ) from error


def _highest(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _optional(source: Path, name: str) -> dict[str, Any]:
    return dict(read_json(source / name)) if (source / name).exists() else {}


def _token(value: object, *, special: bool = True) -> AddedToken | None:
    """Read a token with its flags, or the text of a special one; None for anything else."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value[flag] for flag in _FLAGS if flag in value}
        return AddedToken(value["content"], **{"special": special, **flags})
    return None


def _names(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Return the tokens that have a name, in the order in which transformers adds them."""
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    keys = (*_NAMED, *(key for key in named if key.endswith("_token") and key not in _NAMED))
    tokens = {key: _token(named[key]) for key in keys if key in named}
    return {key: token for key, token in tokens.items() if token is not None}


def _extend(
    backend: tokenizers.Tokenizer, source: Path, config: Mapping[str, Any],
    names: dict[str, AddedToken], rows: int,
) -> bool:
    """Add what the other files add to `tokenizer.json`, as transformers does; whether it did."""
    present = backend.get_added_tokens_decoder().values()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    called = {token.content for token in names.values()}
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = [token for token in map(_token, listed) if token] if isinstance(listed, list) else []
    stated = {int(id_): _token(value, special=False)
              for id_, value in config.get("added_tokens_decoder", {}).items()}
    if "added_tokens_decoder" not in config:
        special = called | {token.content for token in extra}
        stated = {int(id_): _token(text, special=text in special)
                  for text, id_ in _optional(source, "added_tokens.json").items()
                  if text not in {token.content for token in present}}
    before = {repr(token) for token in present}
    new = [token for _, token in sorted(stated.items()) if token and repr(token) not in before]
    for token in new:
        token.special |= token.content in called
    backend.add_tokens(new)
    for id_, said in stated.items():
        if said and said.content not in vocabulary and backend.token_to_id(said.content) != id_:
            raise CheckpointError(
                f"{source.name} gives the added token {said.content[:40]!a} the id {id_}, and "
                f"behind its tokenizer.json it is {backend.token_to_id(said.content)}; copy its "
                "tokenizer files again."
            )
    have = {token.content for token in (*present, *new)}
    for token in (*names.values(), *extra):
        if token.content in have or (  # or the model has no row for it
            backend.token_to_id(token.content) is None and _highest(backend) + 1 >= rows
        ):
            continue
        token.special = True
        new.append(token)
        have.add(token.content)
        backend.add_tokens([token])
    return bool(new)


def _ids(source: Path) -> tuple[int | None, tuple[int, ...]]:
    """Return begin and end token ids; generation_config.json overrides config.json."""
    fields: dict[str, Any] = {}
    for file in ("config.json", "generation_config.json"):
        record = _optional(source, file)
        fields |= {name: value for name, value in record.items() if value is not None}
    bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id", [])
    ends = eos if isinstance(eos, list) else [eos]
    if any(type(id_) is not int or id_ < 0 for id_ in (*ends, 0 if bos is None else bos)):
        raise CheckpointError(
            f"The bos_token_id or eos_token_id of {source.name} is no token id; copy it again."
        )
    return bos, tuple(dict.fromkeys(ends))


def _template(source: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template; of several that have names, the default and that for tools."""
    files = {"default": source / "chat_template.jinja"} | {
        path.stem: path for path in sorted(source.glob("additional_chat_templates/*.jinja"))
    }
    written = {name: path.read_text("utf-8") for name, path in files.items() if path.exists()}
    found = written or config.get("chat_template")
    if found is None:
        found = _optional(source, "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if found is None or isinstance(found, str):
        return found
    if not all(isinstance(text, str) for text in found.values()):
        raise TypeError("a template is no text")
    if "default" not in found:
        raise CheckpointError(
            f"{source.name} has the chat templates {', '.join(sorted(found))[:80]!a} and none "
            "named default; write the one to use to its chat_template.jinja."
        )
    default: str = found["default"]
    if "tool_use" not in found:
        return default
    # As transformers chooses. The line breaks are those that Jinja takes away anyway.
    tools = found["tool_use"].removesuffix("\n")
    return (
        f"{{%- if tools is not none %}}\n{tools}{{%+ else %}}\n"
        f"{default.removesuffix(chr(10))}{{%+ endif %}}"
    )


def _check_template(tokenizer: Tokenizer) -> None:
    """Raise the template's own complaint if it lays out neither of two plain conversations.

    One that leaves out what a user says would go unnoticed.
    """
    user = Message(role="user", content="Probe")
    try:
        written = tokenizer.render([user])
    except TokenizerError:
        if not tokenizer.has_system_role:
            raise
        return
    if user.text not in written:
        raise TokenizerError(
            "The chat template leaves out what a user says, or is no template; take the model's "
            "own chat_template.jinja."
        )
