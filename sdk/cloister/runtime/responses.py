"""Answers that were given before, sealed: the same prompt, settings and bundle give them again."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from cloister.errors import NotEnoughDisk, VaultDamaged
from cloister.vault.namespace import Kind
from cloister.vault.seal import context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.runtime.sampling import Sampling
    from cloister.vault.namespace import Namespace
    from cloister.vault.retention import Retention

__all__ = ["ResponseCache"]

Answer = list[tuple[int, str, float, list[tuple[int, float]]]]
"""Of each token: id, text, log-probability and the likeliest others."""


class ResponseCache:
    """The answers of one model, in a namespace."""

    def __init__(
        self, space: Namespace, model_id: str, retention: Retention | None = None
    ) -> None:
        self.space, self.retention = space, retention
        self._model = bytes.fromhex(model_id)

    def get(
        self, ids: Sequence[int], sampling: Sampling, limit: int, top: int
    ) -> tuple[Answer, str] | None:
        """The answer to a prompt and how it finished; None where it is not kept, or damaged."""
        name = self._name(ids, sampling, limit, top)
        try:
            record = None if name is None else self.space.get(Kind.RESPONSES, name)
        except VaultDamaged:  # the next answer takes its place
            return None
        if record is None:
            return None
        held = json.loads(record)
        return held["tokens"], held["finish"]

    def put(
        self, ids: Sequence[int], sampling: Sampling, limit: int, top: int, answer: Answer,
        finish: str,
    ) -> None:
        """Keep an answer, unless chance had a part in it, or the disk is full.

        Raises:
            VaultError: see `Namespace.put`.
        """
        name = self._name(ids, sampling, limit, top)
        if name is None:
            return
        record = json.dumps({"tokens": answer, "finish": finish}).encode()
        with suppress(NotEnoughDisk):
            self.space.put(Kind.RESPONSES, name, record)
            if self.retention is not None:
                self.space.trim(Kind.RESPONSES, self.retention)

    def _name(
        self, ids: Sequence[int], sampling: Sampling, limit: int, top: int
    ) -> bytes | None:
        if sampling.temperature and sampling.seed is None:
            return None
        settings = json.dumps(
            {**asdict(sampling), "limit": limit, "top": top}, sort_keys=True)
        prompt = b"".join(id_.to_bytes(4, "big") for id_ in ids)
        return context("response", self._model, settings, prompt)
