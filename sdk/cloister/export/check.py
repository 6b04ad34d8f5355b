"""What a program and its quantized checkpoint give for packaged conversations, and what they lost.

That the program is right is proved part by part (`parts`), since two correct implementations drift
apart as far as rounding reaches. What both lost is measured against the unquantized parent: they
are two draws of the same rounding, and as far from it as each other.

Shapes: B conversations, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch

from cloister.errors import ExportMismatch
from cloister.example import Example
from cloister.export.parts import BOUND, ZeroHistory
from cloister.pairs import request
from cloister.summary import Summary

if TYPE_CHECKING:
    from cloister.export.parts import Gap
    from cloister.model.transformer import Decoder
    from cloister.tokenizer import Tokenizer

__all__ = [
    "TOKENS",
    "CheckReport",
    "Divergences",
    "Reading",
    "conversations",
    "distinct",
    "lay_out",
    "measure",
    "tokens_for",
]

TOKENS = 2048
LEAST_TOKENS = 128
WORK = 2.5e11  # parameters times tokens: a large model is measured on fewer
FACTOR, SLACK = 2.0, 0.01  # a program may lose FACTOR times as much as its checkpoint, and SLACK
_DIFFERENT = 16  # ids at least that parts are compared on
_BATCH = 4  # conversations whose logits are in memory

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Divergence(Protocol):
    """The figures of a divergence that the check reads."""

    @property
    def mean_kld(self) -> float:
        """Nats a token."""

    @property
    def top1(self) -> float:
        """Share of positions with the same most likely token."""

    @property
    def histogram(self) -> Mapping[str, int]:
        """Number of positions in each range of divergence."""

    def to_dict(self) -> Mapping[str, float | int]:
        """JSON-ready."""


Compare = Callable[[Pairs], Divergence]
"""Measures the divergence over pairs of logits, of a reference and of a candidate."""


def lay_out(tokenizer: Tokenizer, system: str | None, prompt: str) -> list[int]:
    """Return the ids of a request; without a system role, the system prompt precedes the text."""
    example = Example(task=system or "", input=prompt, target="")
    return tokenizer.encode_chat(request(tokenizer, example.messages))


def tokens_for(parameters: int) -> int:
    """Return on how many tokens a model of so many parameters is measured."""
    return min(TOKENS, max(LEAST_TOKENS, int(WORK / parameters)))


def conversations(
    tokenizer: Tokenizer, context: int, tokens: int = TOKENS
) -> list[list[int]]:
    """Return the conversations that an export is checked on, none longer than `context`.

    At least `tokens` ids in all, unless the context is too short for that.
    """
    text = resources.files("cloister.export").joinpath("check.jsonl").read_text("utf-8")
    texts: list[list[int]] = []
    for row in map(json.loads, text.splitlines()):
        ids = lay_out(tokenizer, row["system"], row["prompt"]) + tokenizer.encode(row["answer"])
        texts.append(ids[:context])
        if sum(map(len, texts)) >= tokens:
            break
    return texts


def distinct(texts: list[list[int]], vocab_size: int) -> list[int]:
    """Return the ids of all `texts`, or as many random ones where they hold too few different ones.

    A tokenizer that knows no word of them makes one token of all; then every row is the same, and
    an activation on the edge between two of its 8 bits lies there in each.
    """
    ids = list(chain.from_iterable(texts))
    if len(set(ids)) >= min(_DIFFERENT, vocab_size):
        return ids
    rng = torch.Generator().manual_seed(0)
    random: list[int] = torch.randint(vocab_size, (len(ids),), generator=rng).tolist()
    return random


class Reading:
    """What a decoder makes of conversations: iterated, the logits of each, float32[T, V]."""

    def __init__(self, decoder: Decoder, texts: list[list[int]]) -> None:
        """Read all at once, since every call of `decoder` unpacks its weights."""
        self._decoder, self._lengths = decoder, [len(ids) for ids in texts]
        tokens_BT = torch.zeros(len(texts), max(self._lengths), dtype=torch.int64)
        for row, ids in zip(tokens_BT, texts, strict=True):
            row[:len(ids)] = torch.tensor(ids)  # what follows is masked by causality
        with torch.inference_mode():
            self._hidden_BTD = decoder.hidden(tokens_BT, 0, ZeroHistory(decoder.config))

    def __iter__(self) -> Iterator[torch.Tensor]:
        for first in range(0, len(self._lengths), _BATCH):
            rows = slice(first, first + _BATCH)
            with torch.inference_mode():
                logits_BTV = self._decoder.logits(self._hidden_BTD[rows])
            for logits_TV, length in zip(logits_BTV, self._lengths[rows], strict=True):
                yield logits_TV[:length]


@dataclass(frozen=True, kw_only=True)
class Divergences:
    """The divergences between a program, its checkpoint and the unquantized parent of both."""

    program_from_checkpoint: Divergence
    program_from_parent: Divergence | None = None
    checkpoint_from_parent: Divergence | None = None


def measure(
    score: Callable[[list[int]], torch.Tensor], texts: list[list[int]],
    checkpoint: Iterable[torch.Tensor], compare: Compare,
    parent: Iterable[torch.Tensor] | None = None
) -> Divergences:
    """Return the divergences of a program, whose logits `score` gives, from others on `texts`.

    `checkpoint` and `parent` give the logits of each text, and may be read more than once.
    Without the parent there is no bound: how far rounding reaches depends on the model.

    Raises:
        ExportMismatch: the program lost more of the parent than rounding explains.
    """
    between = compare(zip(checkpoint, map(score, texts), strict=True))
    if parent is None:
        return Divergences(program_from_checkpoint=between)
    eager = compare(zip(parent, checkpoint, strict=True))
    program = compare(zip(parent, map(score, texts), strict=True))
    if not program.mean_kld <= FACTOR * eager.mean_kld + SLACK:
        raise ExportMismatch(
            f"The program is {program.mean_kld:.2g} nats a token from the unquantized model and "
            f"its checkpoint only {eager.mean_kld:.2g}; nothing was written, report it."
        )
    return Divergences(
        program_from_checkpoint=between, program_from_parent=program, checkpoint_from_parent=eager)


@dataclass(frozen=True, kw_only=True)
class CheckReport(Summary):
    """What an export found of a program: its proof, and what it lost."""

    parts: int  # that were compared
    worst: Gap
    constants_bytes: int  # of tensors that are the checkpoint's
    divergences: Divergences
    parent: str | None  # identity of the unquantized parent, where the checkpoint names it

    def summary(self) -> Iterator[tuple[str, str]]:
        """Return the proof, and the divergences."""
        yield "parts compared", f"{self.parts:,}; the worst is {self.worst.part}"
        yield "its distance, and the bound", f"{self.worst.size:.2g}, {BOUND:.2g}"
        yield "weights of the checkpoint", f"{self.constants_bytes:,} bytes"
        for name, found in vars(self.divergences).items():
            if found is not None:
                yield name.replace("_", " "), (
                    f"{found.mean_kld:.2g} nats a token, {found.top1:.2%} the same likeliest token")

    def to_dict(self) -> dict[str, object]:
        """Return the program's part of the receipt, JSON-ready."""
        found = self.divergences
        against: dict[str, object] = {"parent": self.parent}
        if found.program_from_parent is None or found.checkpoint_from_parent is None:
            against["reason"] = (
                "the checkpoint names no parent" if self.parent is None
                else "the parent's weights are not beside the checkpoint")
        else:
            against |= {"program": found.program_from_parent.to_dict(),
                        "checkpoint": found.checkpoint_from_parent.to_dict()}
        return {
            "program_against_checkpoint": {
                **found.program_from_checkpoint.to_dict(),
                "histogram": dict(found.program_from_checkpoint.histogram)},
            "parts_against_checkpoint": {
                "parts": self.parts, "bound": BOUND, "worst": asdict(self.worst),
                "constants_bytes": self.constants_bytes},
            "against_parent": against,
        }
