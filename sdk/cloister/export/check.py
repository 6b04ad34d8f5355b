"""The proof that a program computes what its checkpoint computes, on packaged conversations.

Shapes: B conversations, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from cloister.errors import ExportMismatch
from cloister.example import Example
from cloister.model.quantized import QuantizedLinear
from cloister.pairs import request

if TYPE_CHECKING:
    from cloister.model.transformer import Decoder
    from cloister.tokenizer import Tokenizer

__all__ = ["TOKENS", "check", "conversations", "lay_out"]

TOKENS = 2048
MAX_KLD = 1e-3  # nats a token, mean
MIN_TOP1 = 0.99
ROUNDING = 2.0**-22  # of an activation: what two orders of summing it differ by
SLACK = 4.0  # times the divergence that rounding alone makes
_BATCH = 16  # conversations

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Divergence(Protocol):
    """The figures of a divergence that the check reads."""

    @property
    def mean_kld(self) -> float:
        """Nats a token."""

    @property
    def top1(self) -> float:
        """Share of positions with the same most likely token."""


_Divergence = TypeVar("_Divergence", bound=Divergence)


def lay_out(tokenizer: Tokenizer, system: str | None, prompt: str) -> list[int]:
    """Return the ids of a request; without a system role, the system prompt precedes the text."""
    example = Example(task=system or "", input=prompt, target="")
    return tokenizer.encode_chat(request(tokenizer, example.messages))


def conversations(tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Return the conversations that every export is checked on, none longer than `context`.

    At least TOKENS ids in all, unless the context is too short for that.
    """
    text = resources.files("cloister.export").joinpath("check.jsonl").read_text("utf-8")
    texts: list[list[int]] = []
    for row in map(json.loads, text.splitlines()):
        ids = lay_out(tokenizer, row["system"], row["prompt"]) + tokenizer.encode(row["answer"])
        texts.append(ids[:context])
        if sum(map(len, texts)) >= TOKENS:
            break
    return texts


def check(
    decoder: Decoder, score: Callable[[list[int]], torch.Tensor], texts: list[list[int]],
    compare: Callable[[Pairs], _Divergence]
) -> _Divergence:
    """Return the divergence of a program, whose logits `score` gives, from `decoder` on `texts`.

    A right program's logits differ by rounding, which in a trained model stays small. Where a
    model is untrained or ill-conditioned, an activation that falls on the other side of an 8-bit
    step changes all that follows: so a divergence above MAX_KLD is compared with that of the
    decoder from itself, with its activations off by ROUNDING.

    Raises:
        ExportMismatch: the program does not compute what the decoder computes.
    """
    measured = compare(
        (expected, score(ids))
        for expected, ids in zip(_logits(decoder, texts), texts, strict=True)
    )
    if measured.mean_kld <= MAX_KLD and measured.top1 >= MIN_TOP1:
        return measured
    rounding = compare(zip(_logits(decoder, texts), _logits(decoder, texts, _rounded), strict=True))
    most = max(MAX_KLD, SLACK * rounding.mean_kld)
    least = 1 - max(1 - MIN_TOP1, SLACK * (1 - rounding.top1))
    if not (measured.mean_kld <= most and measured.top1 >= least):
        raise ExportMismatch(
            f"The program differs from the checkpoint by a mean KL divergence of "
            f"{measured.mean_kld:.2g} (at most {most:.2g}) and agrees on {measured.top1:.2%} of "
            f"the most likely tokens (at least {least:.0%}); nothing was written, report it."
        )
    return measured


def _logits(
    decoder: Decoder, texts: list[list[int]],
    under: Callable[[Decoder], AbstractContextManager[object]] = nullcontext
) -> Iterator[torch.Tensor]:
    """Yield the logits of each text, float32[T, V], with the decoder `under` a condition.

    Several texts at a time, since each call unpacks the weights.
    """
    for first in range(0, len(texts), _BATCH):
        group = texts[first:first + _BATCH]
        tokens_BT = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
        for row, ids in zip(tokens_BT, group, strict=True):
            row[:len(ids)] = torch.tensor(ids)  # what follows is masked by causality
        with torch.inference_mode(), under(decoder):
            logits_BTV = decoder(tokens_BT)
        for logits_TV, ids in zip(logits_BTV, group, strict=True):
            yield logits_TV[:len(ids)]


@contextmanager
def _rounded(decoder: Decoder) -> Iterator[None]:
    """Let every linear layer read its activations off by ROUNDING, up or down."""
    rng = torch.Generator().manual_seed(0)

    def perturb(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (x,) = inputs
        return (x * (1 + ROUNDING * torch.empty_like(x).uniform_(-1, 1, generator=rng)),)

    hooks = [
        module.register_forward_pre_hook(perturb)
        for module in decoder.modules() if isinstance(module, QuantizedLinear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
