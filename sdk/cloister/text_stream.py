"""The text of an answer, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = ["TextStream"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of ids that arrive one by one, correct where a character spans tokens.

    The texts that `push` and `end` give, joined, are what `Tokenizer.decode` gives for all ids.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], hidden: Collection[int], *, lead: str = "",
    ) -> None:
        """Decode by `decode`; the ids `hidden` have no text, and a `lead` is left out."""
        self._decode, self._hidden, self._lead = decode, hidden, lead
        self._pending: list[int] = []
        self._shown = 0  # characters of the pending ids' text that were returned already

    def push(self, id_: int) -> str:
        """Return the text that `id_` completes; empty while a character is unfinished."""
        if id_ in self._hidden:
            return ""
        self._pending.append(id_)
        text = self._decode(self._pending)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[self._shown:]
        # The fewest last ids that are text by themselves stay, never none: some tokenizers
        # join words, or bytes, by what stood before.
        for start in reversed(range(len(self._pending))):
            rest = self._decode(self._pending[start:])
            if rest and _UNFINISHED not in rest:
                break
        self._pending, self._shown = self._pending[start:], len(rest)
        return self._without_lead(new)

    def end(self) -> str:
        """Return the rest of the text, unfinished characters as U+FFFD."""
        text = self._decode(self._pending)[self._shown:]
        self._pending, self._shown = [], 0
        return self._without_lead(text)

    def _without_lead(self, text: str) -> str:
        if text:
            text, self._lead = text.removeprefix(self._lead), ""
        return text
