"""A request being answered, and what was answered: told in order, kept in memory only."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloister.runtime.chat import Token
from cloister_jupyter.events import Delta, Scored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloister.runtime.chat import Ask, Stats
    from cloister.runtime.client import Worker, WorkerSession
    from cloister_jupyter.events import Event
    from cloister_jupyter.request import Request

__all__ = ["Answer", "Run", "shortened"]

# A message of a kernel has some 700 bytes around its text: a thousand tokens are to take less than
# 100 kB. A slower model than one of 40 tokens a second is not held back for that.
_BATCH, _BATCH_S = 10, 0.25  # tokens that go into a message, and most that they wait for others
_PART = 128  # most tokens whose scores go into one message
_WAIT_S = 0.2  # most that a score waits for others


def shortened(logprob: float) -> float:
    """Return a log-probability as it is sent: three digits, down to a thousandth of a nat."""
    return float(f"{round(logprob, 3):.3g}")


@dataclass
class Answer:
    """A column's answer, or a branch of one."""

    column: str  # whose bundle gave it
    tokens: list[Token] = field(default_factory=list, repr=False)
    scores: list[Token] = field(default_factory=list, repr=False)  # under the reference's model
    told: int = 0  # tokens whose own log-probabilities the page knows


class Run:
    """A request being answered: what is told of it, and the wish to stop."""

    def __init__(self, request: Request, tell: Callable[[Event], None]) -> None:
        self.request, self._tell = request, tell
        self.stopping = threading.Event()
        self.answers: dict[str, Answer] = {}
        self._answering: tuple[Worker, WorkerSession] | None = None
        self._lock = threading.RLock()  # of what follows, so that events go out in order
        self._seq = 0
        self._column, self._texts = "", list[str]()
        self._flushed, self._flushed_s = "", 0.0  # whose tokens were sent last, and when

    @property
    def reference(self) -> str | None:
        """The highest column that answered: others are compared with it."""
        return next((id_ for id_ in self.request.columns
                     if id_ in self.answers and self.answers[id_].tokens), None)

    def tell(self, kind: type[Event], /, **values: object) -> None:
        """Send an event, after the tokens that came before it."""
        with self._lock:
            self.flush()
            event = kind(run=self.request.run, seq=self._seq, **values)  # type: ignore[arg-type]
            self._seq += 1
            self._tell(event)

    def flush(self) -> None:
        """Send the tokens that wait."""
        with self._lock:
            if self._texts:
                self._flushed, self._flushed_s = self._column, time.monotonic()
                texts, self._texts = tuple(self._texts), []
                self.tell(Delta, column=self._column, texts=texts)

    def flush_batch(self) -> None:
        """Send the tokens that wait, where they are enough, waited enough, or are the first."""
        with self._lock:
            if (len(self._texts) >= _BATCH or self._flushed != self._column
                    or time.monotonic() > self._flushed_s + _BATCH_S):
                self.flush()

    def add(self, column: str, token: Token) -> None:
        """Keep a token, and let its text wait for the next batch."""
        with self._lock:
            self._column = column
            self._texts.append(token.text)
            self.answers[column].tokens.append(token)

    def tell_scores(self, column: str, by: str, at: int, tokens: Sequence[Token]) -> None:
        """Tell how likely `tokens` of an answer are, from number `at` on."""
        for start in range(0, len(tokens), _PART):
            part = tokens[start:start + _PART]
            self.tell(
                Scored, column=column, by=by, at=at + start,
                logprobs=tuple(shortened(token.logprob) for token in part),
                ranks=tuple(token.rank for token in part))

    def score(self, column: str, worker: Worker, by: str) -> None:
        """Let the model of column `by`, in `worker`, say how likely an answer's tokens are."""
        answer, request = self.answers[column], self.request
        forced = tuple(token.id for token in answer.tokens)
        known, waiting, sent_s = len(answer.scores), list[Token](), time.monotonic()

        def send() -> None:
            nonlocal sent_s
            sent_s = time.monotonic()
            self.tell_scores(column, by, len(answer.scores), waiting)
            answer.scores.extend(waiting)
            waiting.clear()

        def each(token: Token) -> None:
            nonlocal known
            if known:  # from a time that was stopped
                known -= 1
                return
            waiting.append(token)
            if len(waiting) == _PART or time.monotonic() > sent_s + _WAIT_S:
                send()

        self.read(worker, request.ask(forced=forced, max_tokens=len(forced)), each)
        send()

    def read(self, worker: Worker, ask: Ask, each: Callable[[Token], None]) -> Stats:
        """Read an answer to its end, and return what it took."""
        with contextlib.closing(worker.session(system=self.request.system)) as session:
            answer = session.answer(ask)
            self._answering = worker, session
            try:
                if self.stopping.is_set():  # the wish came before there was what to stop
                    session.stop()
                for token in answer:
                    each(token)
            finally:
                self._answering = None
            return session.stats

    def stop(self) -> None:
        """End the answer that is being made, and begin no other; from any thread.

        Asked for again it ends the process, which may be deaf in a long call of its program.
        """
        again = self.stopping.is_set()
        self.stopping.set()
        answering = self._answering
        if answering is None:
            return
        worker, session = answering
        if again:
            threading.Thread(target=worker.close, daemon=True).start()
        else:
            session.stop()
