"""What a run tells of itself, in order."""

from __future__ import annotations

import msgspec

__all__ = [
    "Began", "Branched", "Delta", "Ended", "Event", "Over", "Ready", "Refused", "Resumed", "Scored",
    "Unscored", "Waits",
]


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """`seq` counts the events of a run from 0, so that a reader sees a gap."""

    run: str
    seq: int

    def __repr__(self) -> str:  # without what was answered
        return f"{type(self).__name__}(run={self.run!r}, seq={self.seq})"


class Waits(_Event, frozen=True):
    """Another lab of this kernel is running; one at a time, or both would measure each other."""


class Began(_Event, frozen=True):
    """A column is next: its process starts where it does not run, and its bundle is loaded."""

    column: str


class Ready(_Event, frozen=True):
    """A column's bundle is loaded, and reads the request."""

    column: str
    load_s: float | None  # None: it was loaded before (warm)


class Delta(_Event, frozen=True):
    """More of an answer: the texts of the tokens that came since the last time."""

    column: str
    texts: tuple[str, ...]


class Ended(_Event, frozen=True):
    """A column's answer is over; what it took."""

    column: str
    finish: str  # end, length, context, stop
    prompt_tokens: int
    tokens: int
    forced_tokens: int  # of these, given: of a branch
    ttft_s: float
    tokens_per_s: float | None
    peak_rss_bytes: int  # of its own process
    bundle_bytes: int


class Refused(_Event, frozen=True):
    """A column cannot answer, or not to the end; the others go on."""

    column: str
    kind: str  # of error
    message: str


class Branched(_Event, frozen=True):
    """Next an answer is gone on from with another token; the branch is a column of its own."""

    column: str  # id of the branch
    parent: str  # id of the answer that it leaves
    at: int  # number of the token that is another


class Scored(_Event, frozen=True):
    """How likely some of an answer's tokens are, from number `at` on."""

    column: str
    by: str  # whose model says so; of the answer's own column it is what it was given with
    at: int
    logprobs: tuple[float, ...]  # nats
    ranks: tuple[int, ...]  # 1 = the likeliest


class Unscored(_Event, frozen=True):
    """Another model cannot say how likely an answer's tokens are."""

    column: str
    by: str
    message: str


class Resumed(_Event, frozen=True):
    """After `Over` more comes, up to another `Over`."""

    scores: bool  # of what was answered; otherwise a branch


class Over(_Event, frozen=True):
    """Nothing more comes."""

    stopped: bool


Event = (Waits | Began | Ready | Delta | Ended | Refused | Branched | Scored | Unscored | Resumed
         | Over)
