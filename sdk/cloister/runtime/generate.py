"""The one token loop of the runtime, and the scoring of given tokens beside it.

With a drafter several tokens are read in one call (speculative decoding). Each is chosen from the
model's own logits all the same, by the same draws, and a guess only says for how long the choices
can be read out of one call: up to the first that is another. That is the rule of Leviathan et al.
(arXiv 2211.17192) for a draft distribution of one point, which accepts a guess with the probability
that the model gives it, and otherwise draws from the rest. So the tokens are those that would have
come without a draft, not only as likely ones, up to the rounding of longer calls, and equality with
one seed is tested in place of distributions.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import time
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
    """Guesses what comes next in one answer, so that several tokens are read in one call."""

    def propose(
        self, positions: Sequence[Position], room: int, forced: Sequence[int] = ()
    ) -> Sequence[int]:
        """Guess at most `room` tokens after `positions`, which only grow; or none.

        `forced` is how what must come by the constraint may be spelled.
        """
        ...

    def took(self, drafted: int, seconds: float) -> None:
        """Note the time of the call that read so many guessed tokens; 0 is a plain step."""
        ...

    def judged(self, *, right: bool) -> None:
        """Note whether the next guessed token was chosen, where all before it were."""
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
    prompt takes several. A drafter changes no token. Forced tokens are read one by one, as those
    that are chosen: where they would have come anyway nothing changes.

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
        for choice in _choices(core, positions, seen, decoding, stats):
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
    core: Core, positions: list[Position], seen: list[int], decoding: Decoding, stats: Stats
) -> Iterator[Choice]:
    """Choose the next token, and further ones as far as a draft is right."""
    constraint, forced, draft = decoding.constraint, None, list[int]()
    drafter = decoding.drafter if seen else None  # a prompt is not read with logits after each
    if len(seen) < len(decoding.forced):
        forced, drafter = decoding.forced[len(seen)], None
    elif drafter is not None:
        draft = _draft(drafter, positions, core.context - len(positions) - 1, constraint)
    if drafter is None:
        rows = core.extend(positions)
    else:
        began_s = time.perf_counter()
        rows = _read(core, positions, draft)
        drafter.took(len(draft), time.perf_counter() - began_s)
        stats.drafted_tokens += len(draft)
    for logits_V, guess in zip(rows, [*draft, None], strict=True):
        choice = decoding.sampler.choose(
            logits_V, seen, top=decoding.top, constraint=constraint, forced=forced)
        if constraint is not None and choice.id not in decoding.end:
            constraint.accept(choice.id)
        if drafter is not None and guess is not None:
            drafter.judged(right=choice.id == guess)
            stats.accepted_tokens += choice.id == guess
        yield choice
        if choice.id != guess:
            return


def _read(core: Core, positions: list[Position], draft: list[int]) -> torch.Tensor:
    """Return logits after the last of `positions`, and after each token of `draft` behind it."""
    if not draft:
        return core.extend(positions)
    core.truncate(len(positions) - 1)  # its row is needed, too
    return core.extend([*positions, *draft], Rows.ALL)[-len(draft) - 1:]


def _draft(
    drafter: Drafter, positions: list[Position], room: int, constraint: Constraint | None
) -> list[int]:
    """Return a draft for at most `room` tokens, as far as the constraint allows it."""
    if room < 1:
        return []
    forced = () if constraint is None else constraint.forced()
    draft = list(drafter.propose(positions, room, forced))[:room]
    return draft if constraint is None or not draft else draft[:constraint.permitted(draft)]


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
            yield rows_NV[max(0, first - start):].clone()  # the next call overwrites them
        start = end
