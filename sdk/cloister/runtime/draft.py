"""What guesses the next tokens of an answer, for the token loop to verify several in one call.

Nothing here decides a token: see `cloister.runtime.generate`. How many are guessed, if any, is
decided in `cloister.runtime.speculation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cloister.runtime.core import Core, Position

__all__ = ["AUTO", "LOOKUP", "OFF", "Guesser", "Lookup", "LowerTier"]

AUTO, LOOKUP, OFF = "auto", "lookup", "off"
"""What `Engine` and the command line take in place of a lower tier; `auto` is lookup where programs
call Cloister's own operators: a token has the same bits in longer calls, and the weights are in
memory once."""

_SIZES = (8, 4, 2, 1)  # of n-grams, the longest first
_FEW = 2  # tokens that are read along with a guess, besides the last one
_NO_TOKEN = -1  # a vector of a picture or recording


class Guesser(Protocol):
    """Guesses what follows the positions of one answer, which only grow."""

    def match(self, positions: Sequence[Position]) -> int | None:
        """Return the kind of guess there is after `positions`, None for none.

        Guesses of a kind are about equally often right.
        """
        ...

    def catch_up(self) -> bool:
        """Read, in one call of a program at most, what a guess needs; False if more is missing."""
        ...

    def propose(self, most: int) -> Sequence[int]:
        """Guess at most `most` tokens after the positions that `match` was asked about last."""
        ...


class Lookup:
    """Prompt lookup: what followed the longest n-gram before that now ends the text.

    It reads the prompt and the answer, each token once: the index has the latest place behind
    each n-gram of some sizes. One belongs to one answer, and what it holds of the text goes with
    it. The kind of a guess is the size of its n-gram. As in "Prompt Lookup Decoding" (Saxena,
    2023) and in the n-gram cache of llama.cpp, there with one size or over many texts.
    """

    def __init__(self, end: Collection[int] = ()) -> None:
        """Guess nothing behind a token of `end`, which ends an answer."""
        self._end = end
        self._ids = list[int]()
        self._behind = dict[tuple[int, ...], int]()  # the latest place behind each n-gram
        self._at = 0

    def match(self, positions: Sequence[Position]) -> int | None:
        """See `Guesser.match`."""
        ids, behind = self._ids, self._behind
        for position in positions[len(ids):]:
            end = len(ids)  # an n-gram is known once something follows it
            for size in _SIZES:
                if size <= end:
                    behind[tuple(ids[end - size:])] = end
            ids.append(position if isinstance(position, int) else _NO_TOKEN)
        for size in _SIZES:
            found = behind.get(tuple(ids[-size:])) if size <= len(ids) else None
            if found is not None:
                self._at = found
                return size
        return None

    def catch_up(self) -> bool:
        """See `Guesser.catch_up`: `match` has read all."""
        return True

    def propose(self, most: int) -> Sequence[int]:
        """See `Guesser.propose`; what reaches the end of the text is taken to go round."""
        draft, period = self._ids[self._at:self._at + most], len(self._ids) - self._at
        while len(draft) < most:
            draft.append(draft[-period])
        for count, id_ in enumerate(draft):
            if id_ == _NO_TOKEN or id_ in self._end:
                return draft[:count + (id_ != _NO_TOKEN)]
        return draft


class LowerTier:
    """A smaller model with the same tokenizer, which answers greedily.

    It reads the text alone of what the larger one reads, with KV buffers of its own, and a long
    text a call at a time: it has no guess before it has read all of it.
    """

    def __init__(self, core: Core, *, vocabulary: int, end: Collection[int] = ()) -> None:
        """Guess with `core` for a model of `vocabulary` rows, and nothing behind one of `end`."""
        self._core, self._vocabulary, self._end = core, vocabulary, end
        self._positions: Sequence[Position] = ()

    def match(self, positions: Sequence[Position]) -> int | None:
        """See `Guesser.match`: all its guesses are of one kind."""
        self._positions = positions
        return 0 if len(positions) < self._core.context else None

    def catch_up(self) -> bool:
        """See `Guesser.catch_up`."""
        read = self._text()[:-1]
        if self._core.common(read) + _FEW < len(read):
            first, *others = self._core.calls(read)
            self._core.extend(read[:first])
            return not others
        return True

    def propose(self, most: int) -> Sequence[int]:
        """See `Guesser.propose`."""
        core, draft, text = self._core, list[int](), self._text()
        while len(draft) < most and len(text) <= core.context:
            draft.append(int(core.extend(text)[0, :self._vocabulary].argmax()))
            text.append(draft[-1])
            if draft[-1] in self._end:
                break
        return draft

    def _text(self) -> list[int]:
        return [position for position in self._positions if isinstance(position, int)]
