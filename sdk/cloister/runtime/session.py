"""A conversation with an engine of this process."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from cloister.errors import SettingError
from cloister.message import Message
from cloister.parts import Picture, Recording
from cloister.runtime.chat import Chat, Stats, Token
from cloister.runtime.encoded import made_s
from cloister.runtime.generate import Decoding, generate
from cloister.runtime.memory import peak_bytes
from cloister.runtime.prompt import Count, decoded, messages_of
from cloister.runtime.sampling import Sampler
from cloister.runtime.tools import tool_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from cloister.pieces import MediaFormats
    from cloister.runtime.chat import Ask, Begin
    from cloister.runtime.conversation import Conversation
    from cloister.runtime.core import Position
    from cloister.runtime.engine import Engine
    from cloister.runtime.prefix import PrefixCache
    from cloister.runtime.prompt import Prompt
    from cloister.runtime.responses import ResponseCache
    from cloister.runtime.sampling import Constraint
    from cloister.vault.store import Vault

__all__ = ["Session"]


class Session(Chat):
    """A conversation: what was said, and how to go on; see `Chat`."""

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        messages: Iterable[Message] = (),
        vault: Vault | None = None,
        namespace: str = "default",
        name: str | None = None,
        cached: bool = False,
        kv: str = "float32",
    ) -> None:
        """Begin a conversation, after `messages`; nothing of it is kept but what is asked for.

        With `name` it is kept in `vault`, under the owner `namespace`, or gone on with where it is
        there. With `cached` what was read and answered before, of the same owner and bundle, comes
        out of the vault, and is kept there. `kv` is how keys and values are kept: `float32`, or
        `int8`, which is not exact.

        Raises:
            SettingError: a name or cache without a vault, or a value outside its bound.
            SessionMismatch: the conversation was begun with another model or system prompt, or
                went on otherwise than `messages`.
            VaultError: the vault cannot be read.
        """
        super().__init__()
        self.engine = engine
        self._conversation: Conversation | None = None
        self._prefixes: PrefixCache | None = None
        self._responses: ResponseCache | None = None
        self._said = list(decoded(list(messages), self._formats()))
        if vault is not None and (cached or name is not None):
            self._keep_in(vault, namespace, name, system, kv)
        elif name is not None or cached:
            raise SettingError("What is kept needs a vault; give one, too.")
        if self._conversation is not None:
            system = self._conversation.system
        self._system = [] if system is None else [Message(role="system", content=system)]
        self._stop = threading.Event()

    def __repr__(self) -> str:
        return f"Session({self.engine!r}, {len(self.messages)} messages)"

    @property
    def messages(self) -> list[Message]:
        """What was said and kept, the system prompt first."""
        said = self._said if self._conversation is None else self._conversation.messages
        return [*self._system, *said]

    @property
    def restored_tokens(self) -> int:
        """Tokens of a kept conversation that need not be read again."""
        return 0 if self._conversation is None else self._conversation.restored

    def stop(self) -> None:
        """End the running answer within one token; what was generated stays."""
        self._stop.set()

    def forget(self) -> None:
        """Delete what was said, and what is kept of it; see `Chat.forget`."""
        super().close()
        if self._conversation is not None:
            self._conversation.forget()
        self._said = []

    def count(
        self, prompt: Prompt, *, tools: Sequence[Mapping[str, object]] | None = None
    ) -> Count:
        """Count the tokens of a prompt; see `Chat.count`."""
        asked = decoded(messages_of(prompt), self._formats())
        return self._prompt([*self.messages, *asked], tools)[1]

    def _formats(self) -> MediaFormats | None:
        return self.engine.bundle.manifest.media

    def _keep_in(
        self, vault: Vault, namespace: str, name: str | None, system: str | None, kv: str
    ) -> None:
        from cloister.runtime.conversation import Conversation
        from cloister.runtime.prefix import PREFIXES, Precision, PrefixCache
        from cloister.runtime.responses import RESPONSES, ResponseCache

        if kv not in list(Precision):
            raise SettingError(f"kv is {kv!r}; it must be one of {', '.join(Precision)}.")
        space = vault.namespace(namespace)
        self._prefixes = PrefixCache(
            self.engine, space, precision=Precision(kv), retention=PREFIXES)
        if name is None:
            self._responses = ResponseCache(space, self.engine.model_id, RESPONSES)
        else:
            self._conversation = Conversation(self._prefixes, name, system=system)
            self._conversation.catch_up(self._said)

    def _answer(self, ask: Ask) -> Begin:
        engine = self.engine
        vocabulary = engine.bundle.manifest.shape.vocab_size
        if ask.top > vocabulary:
            raise SettingError(f"top is {ask.top}; it must be from 0 to {vocabulary}.")
        said, least = self.messages, len(self._system)
        if ask.after is not None and not least <= ask.after <= len(said):
            raise SettingError(
                f"after is {ask.after}; it must be from {least} to the {len(said)} messages of the "
                "conversation.")
        if self._conversation is not None:
            self._conversation.check()
        if max(ask.forced, default=0) >= vocabulary:
            raise SettingError(
                f"forced holds {max(ask.forced)}; this bundle's token ids are below {vocabulary}.")
        began = time.perf_counter()
        positions, count = self._prompt([*said[:ask.after], *ask.messages], ask.tools)
        count.check(engine.context)
        spent_s = time.perf_counter() - began
        constraint = engine.constraint(ask)
        known = None if self._responses is None else self._responses.get(positions, ask)
        read = [] if known else positions
        owner = object()

        def settle(said: list[Token]) -> None:
            try:
                self.stats.peak_rss_bytes = peak_bytes()
                self._keep(ask, said, [*read, *(token.id for token in said)] if read else [])
            finally:
                engine.release(owner)

        def begin() -> tuple[Generator[Token], Callable[[list[Token]], None]]:
            engine.claim(owner)
            self._stop.clear()
            self.stats = Stats(
                prompt_tokens=len(positions), picture_tokens=count.picture,
                recording_tokens=count.recording, spent_s=spent_s)
            tokens = self._generate(positions, ask, constraint, owner) if known is None else (
                self._again(*known))
            return tokens, settle

        return begin

    def _prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] | None
    ) -> tuple[list[Position], Count]:
        """Return what the engine reads of `messages`, and how much that is."""
        engine, kept = self.engine, self._prefixes
        ids = engine.tokenizer.encode_chat(messages, tools=tools)
        parts = [part for message in messages for part in message.media
                 if isinstance(part, Picture | Recording)]
        with engine.exclusive():  # an encoder may be used
            positions = engine.positions(ids, parts, kept)
            sizes = [(isinstance(part, Picture), len(engine.media(part, kept))) for part in parts]
        pictures = [size for picture, size in sizes if picture]
        recordings = [size for picture, size in sizes if not picture]
        return positions, Count(
            text=len(positions) - sum(pictures) - sum(recordings), picture=sum(pictures),
            recording=sum(recordings), pictures=len(pictures), recordings=len(recordings))

    def _keep(self, ask: Ask, said: Sequence[Token], positions: Sequence[Position]) -> None:
        """Take up a turn: in the vault first, where the conversation is kept."""
        text = "".join(token.text for token in said)
        if not text:
            return
        calls = tool_calls(text) if ask.tools is not None else ()
        turn = [*ask.messages, Message(role="assistant", content=text, tool_calls=calls)]
        after = None if ask.after is None else ask.after - len(self._system)
        if self._conversation is not None:
            self._conversation.add(turn, positions, after=after)
            return
        self._said = [*self._said[:after], *turn]
        if self._prefixes is not None:
            self._prefixes.keep(positions)

    def _again(self, answer: list[Token], finish: str) -> Generator[Token]:
        """Give an answer that was given before."""
        self.stats.begin()
        self.stats.finish = "stop"
        for token in answer:
            if self._stop.is_set():
                return
            self.stats.count()
            if self.stats.tokens == len(answer):
                self.stats.finish = finish
            yield token

    def _generate(
        self, prompt: list[Position], ask: Ask, constraint: Constraint | None, owner: object
    ) -> Generator[Token]:
        engine, stats = self.engine, self.stats
        stats.begin()  # what the vault gives back takes its time, too
        end = engine.bundle.manifest.eos
        decoding = Decoding(
            sampler=Sampler(ask.sampling), end=end, limit=ask.max_tokens, top=ask.top,
            constraint=constraint, forced=ask.forced, drafter=engine.drafter())
        if self._prefixes is not None:
            stats.restored_tokens = self._prefixes.fetch(prompt)
        text, answer = engine.tokenizer.stream(answer=True), list[Token]()
        for choice in generate(
            engine, prompt, decoding, stats=stats, stopped=self._stop.is_set, owner=owner
        ):
            if not answer:
                stats.encode_s = made_s(prompt)
            piece = "" if choice.id in end else text.push(choice.id)
            if stats.finish != "stop":
                piece += text.end()
            token = Token(choice.id, piece, choice.logprob, choice.top, choice.rank)
            answer.append(token)
            # One that its constraint was not met by is not to be given again.
            whole = stats.finish == "end" or (stats.finish != "stop" and constraint is None)
            if whole and self._responses is not None:
                self._responses.put(prompt, ask, answer, stats.finish)
            yield token
