"""A request as a page sends it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from cloister.errors import SettingError
from cloister.runtime.chat import Sampling
from cloister_jupyter.runs import Request

__all__ = ["request_of"]

_Setting = Literal["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]


class _Sent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: str
    run: str
    prompt: str
    sampling: dict[_Setting, int | float]
    max_tokens: int | None
    columns: tuple[str, ...] = ("",)  # where there is one alone it has no name
    system: str | None = None
    after: int | None = None  # messages of a conversation that it follows

    def __repr__(self) -> str:
        return f"_Sent(run={self.run!r})"


def request_of(content: dict[str, Any]) -> Request:
    """Return what a page asks for.

    Raises:
        SettingError: a value of the wrong kind, or outside its bound.
        PromptError: see `Request`.
    """
    try:
        sent = msgspec.convert(content, _Sent)
    except msgspec.ValidationError:  # its words may quote what was typed
        raise SettingError("A setting is not of its kind; correct the numbers.") from None
    return Request(
        run=sent.run, columns=sent.columns, prompt=sent.prompt, system=sent.system or None,
        sampling=Sampling(**sent.sampling), max_tokens=sent.max_tokens)  # type: ignore[arg-type]
