"""One conversation with an engine."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloister.errors import ContextExceeded, SettingError
from cloister.runtime.sampling import Sampler, Sampling
from cloister.tokenizer import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloister.runtime.conversation import Conversation
    from cloister.runtime.engine import Engine
    from cloister.runtime.prefix import PrefixCache
    from cloister.runtime.responses import Answer, ResponseCache

__all__ = ["Session", "Stats", "Token"]


@dataclass(frozen=True)
class Token:
    """One generated token. Its repr does not show the text."""

    id: int
    text: str = field(repr=False)  # may be empty while a character is unfinished
    logprob: float  # nats, under the model's own distribution
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)


@dataclass
class Stats:
    """What the last answer took."""

    prompt_tokens: int = 0
    restored_tokens: int = 0  # of the prompt, out of the vault
    tokens: int = 0  # generated, the end token included
    finish: str = ""  # end, length, context, stop
    ttft_s: float = 0.0  # to the first token
    decode_s: float = 0.0  # from the first token to the last

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed after the first token; None for fewer than two tokens."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s else None


class Session:
    """A conversation: what was said, and how to go on.

    `stop` may be called from any thread; everything else from one at a time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        name: str | None = None,
        prefixes: PrefixCache | None = None,
        responses: ResponseCache | None = None,
    ) -> None:
        """Begin a conversation; with `name`, keep it where `prefixes` are kept, or go on with it.

        `prefixes` spares reading what was read before, and `responses` answering what was answered.

        Raises:
            SettingError: a name without `prefixes`, or one that is empty or too long.
            SessionMismatch: the conversation was begun with another model or system prompt.
            VaultError: the vault cannot be read.
        """
        self.engine, self.prefixes, self.responses = engine, prefixes, responses
        self.conversation: Conversation | None = None
        self.messages: list[Message] = []
        if name is not None:
            from cloister.runtime.conversation import Conversation

            if prefixes is None:
                raise SettingError("A conversation is kept in a vault; give prefixes, too.")
            self.conversation = Conversation(prefixes, name, system=system)
            system, self.messages = self.conversation.system, self.conversation.messages
        if system is not None:
            self.messages = [Message(role="system", content=system), *self.messages]
        self.stats = Stats()
        self._stop = threading.Event()

    def __repr__(self) -> str:
        return f"Session({self.engine!r}, {len(self.messages)} messages)"

    def stop(self) -> None:
        """End the running answer within one token; what was generated stays."""
        self._stop.set()

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        top: int = 0,
    ) -> Iterator[Token]:
        """Answer `prompt`, token by token; afterwards both belong to the conversation.

        An iterator that is closed early keeps what it gave, as `stop` does. Without any answer the
        prompt is not kept either: many templates refuse two user messages in a row.

        Raises:
            PromptError: empty, not Unicode, or longer than the context; nothing has changed.
            SettingError: `max_tokens` below 1, or `top` out of range.
        """
        vocab_size = self.engine.bundle.manifest.shape.vocab_size
        if not 0 <= top <= vocab_size:
            raise SettingError(f"top is {top}; it must be from 0 to {vocab_size}.")
        if max_tokens is not None and max_tokens < 1:
            raise SettingError(f"max_tokens is {max_tokens}; it must be at least 1.")
        asked = [*self.messages, Message(role="user", content=prompt)]
        engine = self.engine
        ids = engine.tokenizer.encode_chat(asked)
        if len(ids) >= engine.context:
            raise ContextExceeded(
                f"The prompt has {len(ids)} tokens and the context holds {engine.context}, one of "
                "them for the answer; shorten it."
            )
        self._stop.clear()
        limit, sampling = max_tokens or engine.context, sampling or Sampling()
        self.stats = Stats(prompt_tokens=len(ids))
        known = self.responses and self.responses.get(ids, sampling, limit, top)
        tokens = self._again(*known) if known else self._generate(ids, limit, sampling, top)
        return self._said(asked, tokens)

    def _said(self, asked: list[Message], tokens: Iterator[Token]) -> Iterator[Token]:
        """`tokens`, which become the answer to the last of `asked`."""
        said: list[str] = []
        try:
            for token in tokens:
                said.append(token.text)
                yield token
        finally:
            tokens.close()  # type: ignore[attr-defined]  # a generator: it settles its own affairs
            answer = "".join(said)
            if answer:
                new = [asked[-1], Message(role="assistant", content=answer)]
                if self.conversation is not None:
                    self.conversation.add(new)
                elif self.prefixes is not None:
                    self.prefixes.keep()
                self.messages = [*asked[:-1], *new]

    def _again(self, answer: Answer, finish: str) -> Iterator[Token]:
        """An answer that was given before."""
        began = first = time.perf_counter()
        self.stats.finish = "stop"
        for id_, text, logprob, others in answer:
            if self._stop.is_set():
                return
            self.stats.tokens += 1
            if self.stats.tokens == 1:
                first = time.perf_counter()
                self.stats.ttft_s = first - began
            self.stats.decode_s = time.perf_counter() - first
            yield Token(id_, text, logprob, tuple((other, value) for other, value in others))
        self.stats.finish = finish

    def _generate(
        self, ids: list[int], limit: int, sampling: Sampling, top: int
    ) -> Iterator[Token]:
        engine, text = self.engine, self.engine.tokenizer.stream()
        stats, sampler = self.stats, Sampler(sampling)
        prompt, answer = list(ids), []
        began = first = time.perf_counter()
        stats.finish = "stop"
        if self.prefixes is not None:
            stats.restored_tokens = self.prefixes.fetch(ids)
        while True:
            logits = engine.logits(ids, stopped=self._stop.is_set)
            if logits is None:
                return
            choice = sampler.choose(logits, ids[stats.prompt_tokens:], top=top)
            ids.append(choice.id)
            stats.tokens += 1
            if stats.tokens == 1:
                first = time.perf_counter()
                stats.ttft_s = first - began
            stats.decode_s = time.perf_counter() - first
            ended = choice.id in engine.bundle.manifest.eos
            last = ended or stats.tokens == limit or len(ids) == engine.context
            piece = "" if ended else text.push(choice.id)
            if last:
                piece += text.end()
                stats.finish = (
                    "end" if ended else "length" if stats.tokens == limit else "context"
                )
                if self.responses is not None:
                    answer.append((choice.id, piece, choice.logprob, list(choice.top)))
                    self.responses.put(prompt, sampling, limit, top, answer, stats.finish)
            yield Token(choice.id, piece, choice.logprob, choice.top)
            if last:
                return
            answer.append((choice.id, piece, choice.logprob, list(choice.top)))
