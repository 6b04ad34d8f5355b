"""The one token loop of the runtime, and the scoring of given tokens beside it.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cloister.errors import AnswerIncomplete
from cloister.runtime.chat import Stats
from cloister.runtime.core import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator, Sequence

    import torch

    from cloister.runtime.core import Core, Position
    from cloister.runtime.sampling import Choice, Constraint, Sampler

__all__ = ["Decoding", "Drafter", "generate", "score"]


class Drafter(Protocol):
    """Guesses what comes next, so that several tokens are checked in one call."""

    def propose(self, positions: Sequence[Position]) -> Sequence[int]:
        """Guess the tokens after `positions`; as many as it likes, or none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is decoded."""

    sampler: Sampler
    end: Collection[int] = ()  # tokens that end it
    limit: int | None = None  # tokens, the end included
    top: int = 0  # likeliest tokens to tell with each
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    forced: Sequence[int] = ()  # tokens that the answer begins with


def generate(
    core: Core,
    prompt: Sequence[Position],
    decoding: Decoding,
    *,
    stats: Stats | None = None,
    stopped: Callable[[], bool] = lambda: False,
    owner: object | None = None,
) -> Generator[Choice]:
    """Choose the tokens after `prompt` one by one, the end token included.

    The engine is claimed from the first token on until the generator ends or is closed, unless
    `owner` has claimed it. `stopped` is asked before each call of the program, of which a long
    prompt takes several. With a drafter the tokens are those that would have come without it, up to
    the rounding of longer calls. Forced tokens are read one by one, as those that are chosen: where
    they would have come anyway nothing changes.

    Raises:
        EmptyPrompt, ContextExceeded, UnsupportedMedia: see `Core.extend`.
        EngineBusy: another unfinished stream, or another thread, has the engine.
        AnswerIncomplete: the limit or the context's end came before the constraint was met.
        ConstraintError: it does not allow what is forced.
    """
    stats = Stats() if stats is None else stats
    stats.finish = "stop"
    stats.begin()
    owner = object() if owner is None else owner
    claimed = core.claim(owner)
    try:
        yield from _generate(core, list(prompt), decoding, stats, stopped)
    finally:
        if claimed:
            core.release(owner)
    constraint = decoding.constraint
    if constraint is not None and stats.finish in ("length", "context") and not any(
        map(constraint.permits, decoding.end)
    ):
        raise AnswerIncomplete(
            "The answer was cut off before it met its constraint; allow more tokens."
        )


def _generate(
    core: Core, positions: list[Position], decoding: Decoding, stats: Stats,
    stopped: Callable[[], bool],
) -> Iterator[Choice]:
    constraint, seen = decoding.constraint, list[int]()
    limit = core.context if decoding.limit is None else decoding.limit
    for end in core.calls(positions)[:-1]:  # it can be stopped between them
        if stopped():
            return
        core.extend(positions[:end])
    while not stopped():
        for choice in _choices(core, positions, seen, decoding):
            positions.append(choice.id)
            seen.append(choice.id)
            stats.count(forced=len(seen) <= len(decoding.forced))
            if choice.id in decoding.end:
                stats.finish = "end"
            elif constraint is not None and constraint.finished:
                stats.finish = "end"  # without asking for the token that says so
            elif len(seen) == limit:
                stats.finish = "length"
            elif len(positions) == core.context:
                stats.finish = "context"
            yield choice
            if stats.finish != "stop":
                return
            if stopped():
                return


def _choices(
    core: Core, positions: list[Position], seen: list[int], decoding: Decoding
) -> Iterator[Choice]:
    """Choose the next token, and further ones as far as a draft is right."""
    constraint, draft, forced = decoding.constraint, list[int](), None
    if len(seen) < len(decoding.forced):
        forced = decoding.forced[len(seen)]
    elif decoding.drafter is not None and isinstance(positions[-1], int):  # its row is read, too
        room = core.context - len(positions) - 1
        draft = list(decoding.drafter.propose(positions))[:max(0, room)]
    if draft:
        core.truncate(len(positions) - 1)
        rows = core.extend([*positions, *draft], Rows.ALL)[-len(draft) - 1:]
    else:
        rows = core.extend(positions)
    for logits_V, guess in zip(rows, [*draft, None], strict=True):
        choice = decoding.sampler.choose(
            logits_V, seen, top=decoding.top, constraint=constraint, forced=forced)
        if constraint is not None and choice.id not in decoding.end:
            constraint.accept(choice.id)
        yield choice
        if choice.id != guess:
            return


def score(
    core: Core, positions: Sequence[Position], first: int
) -> Iterator[torch.Tensor]:
    """Logits after each of `positions` from number `first` on, float32[N, V] a part.

    What the buffers hold of the positions before is not read again. Pictures and recordings are
    all before `first`.

    Raises:
        EmptyPrompt, ContextExceeded, UnsupportedMedia, EngineBusy: see `Core.extend`.
    """
    if core.common(positions) > first:
        core.truncate(first)
    shown = [at for at in range(first) if not isinstance(positions[at], int)]
    if shown and core.common(positions) <= shown[-1]:  # they have no rows
        core.extend(positions[:shown[-1] + 1])
    start = core.common(positions)
    for end in core.calls(positions):
        rows_NV = core.extend(positions[:end], Rows.ALL)
        if end > first:
            yield rows_NV[max(0, first - start):]
        start = end
