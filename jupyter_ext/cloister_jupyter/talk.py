"""One conversation with one bundle, answered on a thread and told as a stream of events.

The bundle has a worker process of its own, which opens the vault where the conversation is kept:
this process never holds a key of it. What there is to say goes to `tell`, in order. No torch.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from cloister.errors import CloisterError, EngineBusy, SettingError, named
from cloister.message import Message
from cloister.runtime.chat import Ask, Stats
from cloister.runtime.client import Worker
from cloister.runtime.tools import tool_calls
from cloister_jupyter.background import BATCH_S, WARM_S, Idle, every
from cloister_jupyter.runs import Probed
from cloister_jupyter.turn import start

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.runtime.client import WorkerSession
    from cloister.runtime.protocol import Welcome
    from cloister_jupyter.column import Column
    from cloister_jupyter.request import Request

__all__ = ["Asked", "Delta", "Ended", "Event", "Failed", "Ready", "Snapshot", "Talk"]



class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """`seq` counts the events of a conversation, so that a reader sees a gap."""

    seq: int

    def __repr__(self) -> str:  # without what was said
        return f"{type(self).__name__}(seq={self.seq})"


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it is shown; `calls` are the tool calls that it consists of, laid out as JSON.

    Its repr shows no text.
    """

    role: str
    text: str
    media: tuple[str, ...] = ()  # what each picture or recording is
    calls: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Said(role={self.role!r})"


class Asked(_Event, frozen=True):
    """A question stands behind the first `after` messages; what stood there waits for its answer.
    """

    turn: str
    text: str
    media: tuple[str, ...]  # what each picture or recording is
    after: int


class Ready(_Event, frozen=True):
    """The bundle is loaded; how long that took, None where it was before."""

    load_s: float | None


class Delta(_Event, frozen=True):
    """More of the answer, in `tokens` tokens."""

    text: str
    tokens: int


class Ended(_Event, frozen=True):
    """The answer is over, and kept in place of what stood there unless it has no text."""

    turn: str
    finish: str  # end, length, context, stop
    prompt_tokens: int
    tokens: int
    ttft_s: float
    tokens_per_s: float | None
    peak_rss_bytes: int


class Failed(_Event, frozen=True):
    """What was asked for cannot be done, or not to the end."""

    turn: str
    kind: str  # of error
    message: str


class Snapshot(_Event, frozen=True):
    """All that is known: what was said, and the turn at hand."""

    messages: tuple[Said, ...]
    turn: str | None  # None: nothing is going on
    over: str  # the last turn that ended
    text: str  # of its question
    media: tuple[str, ...]
    after: int
    answer: str  # as far as it came
    used: int  # tokens of the context
    context: int  # tokens; 0 before the bundle was loaded
    notice: str | None  # of a vault that was made now


Event = Asked | Ready | Delta | Ended | Failed | Snapshot


class _Turn:
    """Something being done, and the wish to stop it."""

    def __init__(self, id_: str, question: Message | None = None, after: int = 0) -> None:
        self.id, self.question, self.after = id_, question, after
        self.text = "" if question is None else question.text
        self.media = () if question is None else tuple(part.label for part in question.media)
        self.stopping = threading.Event()
        self.session: WorkerSession | None = None  # while it answers
        self.answer = list[str]()
        self.stats: Stats | None = None
        self.told = 0  # tokens of the answer that were told


class Talk:
    """A conversation, one thing at a time; see the module."""

    def __init__(
        self, column: Column, tell: Callable[[Event], None], *, session: str | None = None,
        namespace: str = "default", system: str | None = None,
        passphrase: Callable[[], str] | None = None, warm_s: float = WARM_S,
    ) -> None:
        """Plan a conversation, which `session` keeps in the vault; `passphrase` is asked for that.
        """
        for name, value in (("session", session), ("namespace", namespace), ("system", system)):
            if not isinstance(value, str | None):
                raise SettingError(f"{name} is a text; give one, or leave it out.")
        self.column, self.kept, self._namespace = column, session is not None, namespace
        worker = self._worker = Worker(column.path, vault=self.kept, passphrase=passphrase)
        self._new: Callable[[], WorkerSession] = lambda: worker.session(
            name=session, namespace=namespace, system=system)
        self._first = [] if system is None else [Message(role="system", content=system)]
        self._tell_event = tell
        self._session: WorkerSession | None = None
        self._lock = threading.RLock()  # of what follows, so that events go out in order
        self._turn: _Turn | None = None
        self._over = ""  # the last one that ended
        self._seq = self._used = 0
        self._process = threading.Lock()  # held by who uses the process, or ends it
        self._idle = Idle(warm_s, self._cool)
        self._thread: threading.Thread | None = None
        self.probed: Probed | None = None
        self.welcome: Welcome | None = None
        self.provider = ""  # of the vault's key, once it is open

    def __repr__(self) -> str:
        return f"Talk({self.column.name})"

    @property
    def messages(self) -> list[Message]:
        """What was said and kept."""
        return self._first if self._session is None else self._session.messages

    def open(self) -> None:
        """Start the process and take up the conversation now, on this thread.

        Raises:
            CloisterError: see `Worker.session`.
        """
        with self._process:
            self._load()
        self._idle.begin()

    def ask(self, request: Request, after: int | None = None) -> None:
        """Begin to answer, behind the first `after` messages, or all.

        Raises:
            EngineBusy: something is going on.
        """
        question, messages = request.message, self.messages
        place = len(messages) if after is None else after
        if request.again and 0 <= place < len(messages) and messages[place].role == "user":
            question = _again(messages[place], question)
        ask = Ask.of(question, max_tokens=request.max_tokens, sampling=request.sampling,
                     after=after)
        turn = _Turn(request.run, question, place)
        self._begin(turn, lambda: self._answer(turn, ask))

    def forget(self, turn: str) -> None:
        """Delete the conversation, and end the process whose memory held it."""
        def work() -> None:
            self._load().forget()
            self._worker.close()
            self._used = 0

        self._begin(_Turn(turn), work)

    def reopen(self, turn: str) -> None:
        """Take up what is kept, after another process went on with it."""
        def work() -> None:
            if self.kept and self._session is not None:
                with contextlib.suppress(CloisterError):  # it went on otherwise
                    self._session.close()
                self._session = None
            self._load()

        self._begin(_Turn(turn), work)

    def probe(self, turn: str) -> None:
        """Let the process try to reach out, and note what it found."""
        def work() -> None:
            self._load()
            self.probed = Probed(at=time.strftime("%H:%M:%S"), attempts={
                self.column.name: self._worker.probe()})

        self._begin(_Turn(turn), work)

    def stop(self, turn: str | None = None) -> None:
        """End the answer within a token; only the one called `turn`, where one is named.

        Asked for again it ends the process, which may be deaf in a long call of its program.
        """
        current = self._turn
        if current is None or turn not in (None, current.id):
            return
        again = current.stopping.is_set()
        current.stopping.set()
        if again:
            threading.Thread(target=self._worker.close, daemon=True).start()
        elif current.session is not None:
            current.session.stop()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of what is going on; whether it came."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._turn is None

    def close(self) -> None:
        """Stop, keep what is unfinished, and end the process."""
        self.stop()
        self.wait(10)
        self._idle.cancel()
        self._worker.close()

    def snapshot(self) -> None:
        """Tell all."""
        with self._lock:
            loaded, unlocked, session = (
                self._worker.loaded, self._worker.unlocked, self._session)
            turn = self._turn or _Turn("")
            self._flush(turn)
            self._tell(
                Snapshot, messages=tuple(map(_said, self.messages)),
                turn=turn.id or None, over=self._over, text=turn.text, media=turn.media,
                after=turn.after,
                answer="".join(turn.answer),
                used=self._used or (0 if session is None else session.restored_tokens),
                context=0 if loaded is None else loaded.context,
                notice=None if unlocked is None else unlocked.notice)

    def _tell(self, kind: type[Event], /, **values: Any) -> None:
        with self._lock:
            self._tell_event(kind(seq=self._seq, **values))
            self._seq += 1

    def _flush(self, turn: _Turn) -> None:
        """Tell the tokens that came since the last time."""
        with self._lock:
            if new := turn.answer[turn.told:]:
                turn.told += len(new)
                self._tell(Delta, text="".join(new), tokens=len(new))

    def _begin(self, turn: _Turn, work: Callable[[], None]) -> None:
        with self._lock:
            if self._turn is not None:
                raise EngineBusy("An answer is being made; stop it first.")
            self._turn = turn
            if turn.question is not None:
                self._tell(
                    Asked, turn=turn.id, text=turn.text, media=turn.media, after=turn.after)
        self._thread = threading.Thread(target=self._serve, args=(turn, work), daemon=True)
        self._thread.start()

    def _serve(self, turn: _Turn, work: Callable[[], None]) -> None:
        failure: CloisterError | None = None
        with self._process:
            try:
                with every(BATCH_S, lambda: self._flush(turn)):
                    work()
            except Exception as error:
                failure = named(error, "The chat")
        with self._lock:
            self._flush(turn)
            self._turn, self._over = None, turn.id
            self._idle.begin()
            self._end(turn, failure)

    def _end(self, turn: _Turn, failure: CloisterError | None) -> None:
        if failure is not None:
            self._tell(Failed, turn=turn.id, kind=type(failure).__name__, message=str(failure))
        elif turn.question is not None:
            stats = Stats(finish="stop") if turn.stats is None else turn.stats
            self._tell(
                Ended, turn=turn.id, finish=stats.finish, prompt_tokens=stats.prompt_tokens,
                tokens=stats.tokens, ttft_s=stats.ttft_s, tokens_per_s=stats.decode_tokens_per_s,
                peak_rss_bytes=stats.peak_rss_bytes)
        self.snapshot()

    def _load(self) -> WorkerSession:
        """Return the conversation, its process running."""
        if self._session is None:
            self._session = self._new()
        ready = self._worker.ready(vault=self.kept)
        self.welcome = ready.welcome
        if self._worker.unlocked is not None:
            self.provider = self._worker.unlocked.provider
        return self._session

    def _answer(self, turn: _Turn, ask: Ask) -> None:
        before = self._worker.loaded
        if start(self._worker, turn.stopping) is not None:
            return  # it goes on loading behind, and is warm for the next question
        session, loaded = self._load(), self._worker.loaded
        self._tell(Ready, load_s=None if loaded is None or loaded is before else loaded.load_s)
        self._record(turn.text)
        answer = session.answer(ask)
        turn.session = session
        try:
            if turn.stopping.is_set():  # the wish came before there was what to stop
                session.stop()
            for token in answer:
                turn.answer.append(token.text)
        finally:
            turn.session, turn.stats = None, session.stats
            if turn.answer:
                self._used = session.stats.prompt_tokens + session.stats.tokens
        self._record("".join(turn.answer))

    def _record(self, text: str) -> None:
        """Keep the fingerprints of a text, where the conversation is kept."""
        if self.kept and text:
            self._worker.record([text], namespace=self._namespace)

    def _cool(self) -> None:
        """End the process, unless it is used: the end of that will see to it."""
        if self._process.acquire(blocking=False):
            try:
                self._worker.close()
            finally:
                self._process.release()


def _again(before: Message, now: Message) -> Message:
    """Return a question that is asked again, with the pictures and recordings that it had."""
    if now.content == before.text:
        return before
    media = (*before.media, *now.media)
    return replace(now, content=(*media, now.text) if now.text else media) if media else now


def _said(message: Message) -> Said:
    calls = tool_calls(message.text) if message.role == "assistant" else ()
    return Said(role=message.role, text=message.text, media=tuple(
        part.label for part in message.media), calls=tuple(
        json.dumps({"name": call.name, "arguments": call.arguments}, indent=2, ensure_ascii=False)
        for call in calls))
