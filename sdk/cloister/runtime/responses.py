"""Answers that were given before, sealed: the same prompt, settings and bundle give them again."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from cloister.errors import NotEnoughDisk, VaultDamaged
from cloister.runtime.chat import Token
from cloister.runtime.core import encoded
from cloister.vault.namespace import Kind
from cloister.vault.retention import Retention
from cloister.vault.seal import context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.runtime.chat import Ask
    from cloister.runtime.core import Position
    from cloister.vault.namespace import Namespace

__all__ = ["RESPONSES", "ResponseCache"]

RESPONSES = Retention(most_bytes=64 << 20, hours=30 * 24)

class ResponseCache:
    """The answers of one model, in a namespace."""

    def __init__(
        self, space: Namespace, model_id: str, retention: Retention | None = None
    ) -> None:
        self.space, self.retention = space, retention
        self._model = bytes.fromhex(model_id)

    def get(self, positions: Sequence[Position], ask: Ask) -> tuple[list[Token], str] | None:
        """Return the answer and how it finished; None where it is not kept, or damaged."""
        name = self._name(positions, ask)
        try:
            record = None if name is None else self.space.get(Kind.RESPONSES, name)
        except VaultDamaged:  # the next answer takes its place
            return None
        if record is None:
            return None
        kept = json.loads(record)
        return [
            Token(id_, text, logprob, tuple((other, value) for other, value in top), rank)
            for id_, text, logprob, top, rank in kept["tokens"]
        ], kept["finish"]

    def put(
        self, positions: Sequence[Position], ask: Ask, tokens: Sequence[Token], finish: str
    ) -> None:
        """Keep an answer, unless it was drawn without a seed, or the disk is full.

        Raises:
            VaultError: see `Namespace.put`.
        """
        name = self._name(positions, ask)
        if name is None:
            return
        record = json.dumps({"tokens": [
            (token.id, token.text, token.logprob, token.top, token.rank) for token in tokens
        ], "finish": finish}).encode()
        with suppress(NotEnoughDisk):
            self.space.put(Kind.RESPONSES, name, record)
            if self.retention is not None:
                self.space.trim(Kind.RESPONSES, self.retention)

    def _name(self, positions: Sequence[Position], ask: Ask) -> bytes | None:
        if ask.sampling.temperature and ask.sampling.seed is None:
            return None
        # The order of a schema's properties is the order of the answer's.
        settings = msgspec.json.encode(
            [ask.sampling, ask.max_tokens, ask.top, ask.forced, ask.constraints])
        return context("response", self._model, settings, b"".join(map(encoded, positions)))
