"""One conversation, wherever its model runs: what `Session` and a worker's session have in common.

No torch: a notebook's kernel and the command line use these types.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import (  # msgspec reads the annotations
    Callable,
    Generator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from cloister.errors import EmptyPrompt, EngineBusy, NotEnoughDisk, SettingError
from cloister.interrupt import uninterrupted
from cloister.message import Message
from cloister.runtime.prompt import decoded, messages_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from cloister.pieces import MediaFormats
    from cloister.runtime.prompt import Count, Prompt

__all__ = ["Answer", "Ask", "Begin", "Chat", "Sampling", "Stats", "Token", "Turn"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    Filters apply in the order of the fields. Greedy decoding breaks ties by the lowest id.

    Raises:
        SettingError: a value outside its bound.
    """

    repetition_penalty: float = 1.0  # divides positive logits of this answer's tokens (1 = off)
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # most likely tokens kept (0 = all)
    top_p: float = 1.0  # in (0, 1]; smallest set with this probability (arXiv 1904.09751)
    min_p: float = 0.0  # in [0, 1); share of the best token's probability (arXiv 2407.01082)
    seed: int | None = None  # None: drawn from the operating system

    def __post_init__(self) -> None:
        for name, (kind, good, bound) in _BOUNDS.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            right_kind = isinstance(value, kind) and not isinstance(value, bool)
            if not right_kind or not -1e300 < value < 1e300 or not good(value):
                raise SettingError(f"{name} is {value}; it must be {bound}.")


_BOUNDS: dict[str, tuple[Any, Callable[[float], bool], str]] = {
    "repetition_penalty": (
        float | int, lambda value: 0.01 <= value <= 100, "a number from 0.01 to 100"),
    "temperature": (float | int, lambda value: value >= 0, "a number of at least 0"),
    "top_k": (int, lambda value: value >= 0, "a whole number of at least 0"),
    "top_p": (float | int, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "min_p": (float | int, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "seed": (int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"),
}


@dataclass(frozen=True)
class Token:
    """One generated token. Its repr does not show the text."""

    id: int
    text: str = field(repr=False)  # may be empty while a character is unfinished
    logprob: float  # nats, under the model's own distribution
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)  # likeliest, with logprobs
    rank: int = 0  # 1 = the likeliest; 0 where no likeliest ones were asked for


@dataclass
class Stats:
    """What the last answer took."""

    prompt_tokens: int = 0
    picture_tokens: int = 0  # of the prompt, vectors of pictures
    recording_tokens: int = 0  # of the prompt, vectors of recordings
    restored_tokens: int = 0  # of the prompt, out of the vault
    tokens: int = 0  # of the answer, the end token included
    forced_tokens: int = 0  # of these, given by the question and not chosen
    drafted_tokens: int = 0  # guessed, to be read in one call with the token before
    accepted_tokens: int = 0  # of these, chosen
    finish: str = ""  # end, length, context, stop
    ttft_s: float = 0.0  # to the first token that was chosen
    encode_s: float = 0.0  # of that, to make vectors of pictures and recordings, or put them back
    spent_s: float = 0.0  # of ttft_s, to lay the prompt out, before the answer was read
    decode_s: float = 0.0  # from that one to the last
    peak_rss_bytes: int = 0  # of the process that holds the model

    def begin(self) -> None:
        """Start the clock, unless it runs already."""
        self._began_s = getattr(self, "_began_s", time.perf_counter() - self.spent_s)

    def count(self, *, forced: bool = False) -> None:
        """Count a token that came now; one that was given has no part in the speed."""
        taken_s = time.perf_counter() - self._began_s
        self.tokens += 1
        if forced:
            self.forced_tokens += 1
            return
        if self.tokens - self.forced_tokens == 1:
            self.ttft_s = taken_s
        self.decode_s = taken_s - self.ttft_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed after the first token that was chosen; None for fewer than two of them."""
        chosen = self.tokens - self.forced_tokens
        return (chosen - 1) / self.decode_s if chosen > 1 and self.decode_s else None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A question, and how it is to be answered; see `stream`.

    The answer begins with the token ids `forced`, and goes on from there: a branch of an answer.
    They count among `max_tokens`. Where they fill these, nothing is chosen: what comes is how
    likely each of them was, that is, the score of an answer that another model gave.

    Raises:
        SettingError: a value outside its bound, or more than one constraint.
        EmptyPrompt: there is no message.
    """

    messages: tuple[Message, ...] = field(repr=False)
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    top: int = 0
    after: int | None = None  # messages that it follows; those behind go when its answer is kept
    forced: tuple[int, ...] = field(default=(), repr=False)  # they invert to text
    schema: Mapping[str, object] | None = field(default=None, repr=False)
    grammar: str | None = field(default=None, repr=False)
    choices: Sequence[str] | None = field(default=None, repr=False)
    tools: Sequence[Mapping[str, object]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.messages:
            raise EmptyPrompt("There is no message to answer; give at least one.")
        for name, least in (("max_tokens", 1), ("top", 0), ("after", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise SettingError(f"{name} is {value}; it must be at least {least}.")
        if not all(type(id_) is int and id_ >= 0 for id_ in self.forced):
            raise SettingError("forced holds what is no token id; give whole numbers from 0 on.")
        if self.max_tokens is not None and len(self.forced) > self.max_tokens:
            raise SettingError(
                f"forced has {len(self.forced)} tokens and max_tokens is {self.max_tokens}; raise "
                "max_tokens."
            )
        if sum(part is not None for part in self.constraints) > 1:
            raise SettingError(
                "An answer follows one constraint; give a schema, a grammar, choices or tools."
            )

    @property
    def constraints(self) -> tuple[object, ...]:
        """Schema, grammar, choices and tools, of which one at most is given."""
        return self.schema, self.grammar, self.choices, self.tools

    @classmethod
    def of(cls, prompt: Prompt, **settings: object) -> Ask:
        """Build the question that a caller of `Chat.stream` means."""
        given = {name: value for name, value in settings.items() if value is not None}
        return cls(messages=messages_of(prompt), **given)  # type: ignore[arg-type]  # checked above


class Turn:
    """The answer in the making: tokens, and what becomes of them, settled exactly once.

    `settle` is given the tokens that were read. It runs when the answer ends, fails or is closed,
    whichever comes first; where an interrupt came before it, or the disk was full, at the next
    question or at the end of the program, since `turns` holds the turn until then.
    """

    def __init__(
        self, tokens: Generator[Token], settle: Callable[[list[Token]], None], turns: list[Turn],
    ) -> None:
        self._tokens, self._settle, self._turns = tokens, settle, turns
        self._read: list[Token] = []
        self._lock = threading.RLock()  # an interrupt may leave it to its thread
        turns.append(self)

    def read(self) -> Token:
        """Return the next token; StopIteration after the last.

        Raises:
            EngineBusy: another thread is reading.
        """
        if not self._lock.acquire(blocking=False):
            raise EngineBusy("Another thread reads this answer; read it from one thread.")
        try:
            if self not in self._turns:
                raise StopIteration
            token = next(self._tokens)
            self._read.append(token)
            return token
        except BaseException:  # its end, a failure, an interrupt
            self._end()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the answer here.

        Raises:
            EngineBusy: another thread is reading it.
        """
        running = inspect.getgeneratorstate(self._tokens) == inspect.GEN_RUNNING
        if running or not self._lock.acquire(blocking=False):
            raise EngineBusy(
                "The last question is still being answered; stop it first."
            )
        try:
            self._end()
        finally:
            self._lock.release()

    def _end(self) -> None:
        if self not in self._turns:
            return
        with uninterrupted():
            settled = True
            try:
                self._tokens.close()
                self._settle(self._read)
            except NotEnoughDisk:  # the next question tries again: nobody may have heard of it
                settled = False
                raise
            finally:
                if settled:
                    self._turns.remove(self)


Begin = Callable[[], tuple[Generator[Token], Callable[[list[Token]], None]]]
"""Begins an answer: its tokens, and what settles it; see `Turn`."""


class Answer:
    """What `stream` returns: an iterator, whose reader may drop it at any token."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        return self._turn.read()

    def close(self) -> None:
        """End the answer here; what was read is kept, and what a worker was ahead of it."""
        self._turn.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # sooner than at the next question, where it can be
            self._turn.close()


class Chat(ABC):
    """One conversation. `stop` may be called from any thread, the rest from one at a time.

    A turn is kept when its answer ends, is stopped, fails or is dropped by its reader; the next
    question, `close` and the end of the program see to it where the reader did not. A turn whose
    answer has no text yet is not kept: many templates refuse two user messages in a row.
    """

    def __init__(self) -> None:
        self.stats = Stats()  # of the last answer
        self._turns: list[Turn] = []  # the unfinished one; a list, which needs no `self` at exit
        weakref.finalize(self, _close_at_exit, self._turns)

    @property
    @abstractmethod
    def messages(self) -> list[Message]:
        """What was said and kept, the system prompt first."""

    @abstractmethod
    def stop(self) -> None:
        """End the running answer within one token; what was generated stays."""

    @abstractmethod
    def forget(self) -> None:
        """Delete what was said, and what is kept of it; the system prompt stays.

        Raises:
            EngineBusy: another thread reads an answer of it.
            VaultError: the vault cannot be written.
        """

    @abstractmethod
    def count(
        self, prompt: Prompt, *, tools: Sequence[Mapping[str, object]] | None = None
    ) -> Count:
        """Count the tokens that the context has to hold for `prompt` and what was said before it.

        Pictures and recordings are decoded, and not encoded, unless the model leaves some of their
        vectors out; nothing changes.

        Raises:
            PromptError, SettingError: see `stream`; a prompt that is too long is counted.
        """

    @abstractmethod
    def _formats(self) -> MediaFormats | None:
        """What the model takes besides text."""

    @abstractmethod
    def _answer(self, ask: Ask) -> Begin:
        """Refuse what can be refused, before anything has changed, and return what begins."""

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        top: int = 0,
        schema: Mapping[str, object] | None = None,
        grammar: str | None = None,
        choices: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Iterator[Token]:
        """Answer `prompt` token by token, with the `top` likeliest tokens beside each.

        It is a text, a list of texts, pictures and recordings, a message, or several. Files and
        arrays are decoded first (`cloister.media.read`), before anything has changed.

        At most one of `schema` (JSON Schema), `grammar` (Lark, as llguidance reads it), `choices`
        (texts) and `tools` (JSON Schema functions) constrains the answer; with `tools` it is one
        tool call, and the chat template is told of the tools. An unfinished answer of this
        conversation is ended first, as by `stop`.

        Raises:
            PromptError: empty, not Unicode, longer than the context, or a picture or recording
                that cannot be decoded, or that the model does not take; nothing has changed.
            SettingError: a value outside its bound.
            ConstraintError: the constraint cannot be followed.
            AnswerIncomplete: the answer was cut off before it met its constraint; it is kept.
            EngineBusy: another conversation's answer is being made.
        """
        return self.answer(Ask.of(
            prompt, max_tokens=max_tokens, sampling=sampling, top=top, schema=schema,
            grammar=grammar, choices=choices, tools=tools))

    def answer(self, ask: Ask) -> Iterator[Token]:
        """Answer `ask` token by token; see `stream`.

        With `ask.after` the conversation goes back to its first messages, the system prompt
        counted: an answer is made again, or an earlier question asked otherwise.
        """
        _close_all(self._turns)
        begin = self._answer(replace(ask, messages=decoded(ask.messages, self._formats())))
        with uninterrupted():  # what has begun has a turn that ends it
            return Answer(Turn(*begin(), self._turns))

    def ask(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        schema: Mapping[str, object] | None = None,
        grammar: str | None = None,
        choices: Sequence[str] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Message:
        """Return the whole answer to `prompt`, its tool calls read; see `stream`."""
        _close_all(self._turns)
        count = len(self.messages)
        for _ in self.stream(
            prompt, max_tokens=max_tokens, sampling=sampling, schema=schema, grammar=grammar,
            choices=choices, tools=tools,
        ):
            pass
        said = self.messages
        return said[-1] if len(said) > count else Message(role="assistant", content="")

    def close(self) -> None:
        """Keep what is unfinished, and let go of the conversation."""
        _close_all(self._turns)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

def _close_all(turns: list[Turn]) -> None:
    for turn in list(turns):
        turn.close()


def _close_at_exit(turns: list[Turn]) -> None:
    with contextlib.suppress(Exception):  # nobody is there to be told
        _close_all(turns)
