"""A plain trainer: cross-entropy on the answers, nothing else."""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional

from cloister.model.cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cloister.model.transformer import Decoder

__all__ = ["Schedule", "Sequence", "train"]

IGNORE = -100  # label of a token that is not to be learnt

Sequence = tuple[list[int], list[int]]
"""Prompt ids and answer ids."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    tokens: int = 4096  # a batch, padding included
    peak: float = 3e-3  # learning rate
    warmup: int = 50  # steps
    weight_decay: float = 0.05
    seed: int = 0
    save_every: int = 100  # steps

    def rate(self, step: int) -> float:
        """Learning rate of `step`: linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    decoder: Decoder, data: list[Sequence], schedule: Schedule, state: Path
) -> list[float]:
    """Train `decoder` in place, and give the loss of every step.

    The file `state` holds what is needed to go on after a kill: the same losses follow.
    """
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=schedule.peak, betas=(0.9, 0.95),
        weight_decay=schedule.weight_decay,
    )
    losses: list[float] = []
    if state.exists():
        held = torch.load(state, weights_only=True)
        decoder.load_state_dict(held["decoder"])
        optimizer.load_state_dict(held["optimizer"])
        losses = held["losses"]
    batches = _batches(data, schedule)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    assert isinstance(columns[3], TimeRemainingColumn)
    decoder.train()
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=schedule.steps, note="")
        for step, (tokens, labels) in enumerate(batches):
            if step < len(losses):
                continue
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            learnt = labels[:, 1:] != IGNORE
            with torch.autocast("cpu", torch.bfloat16):
                rows = decoder.hidden(tokens, 0, KVCache(decoder.config))[:, :-1]
                logits = decoder.logits(rows[learnt])
            loss = functional.cross_entropy(logits.float(), labels[:, 1:][learnt])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            speed = tokens.numel() / (time.perf_counter() - began)
            bar.update(
                task, completed=step + 1, note=f"loss {losses[-1]:.4f}, {speed:,.0f} tokens/s"
            )
            if (step + 1) % schedule.save_every == 0:
                _save(state, decoder, optimizer, losses)
    decoder.eval()
    return losses


def _save(
    state: Path, decoder: Decoder, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    part = state.with_suffix(".part")
    torch.save(
        {
            "decoder": decoder.state_dict(),
            "optimizer": optimizer.state_dict(),
            "losses": losses,
        },
        part,
    )
    os.replace(part, state)  # noqa: PTH105  # the atomic one, by its name


def _batches(
    data: list[Sequence], schedule: Schedule
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels, int64[B, T], of examples of like length; passes reshuffle."""
    chance = random.Random(schedule.seed)  # noqa: S311  # not for secrets
    made = 0
    while True:
        order = sorted(data, key=lambda pair: len(pair[0]) + len(pair[1]) + chance.random() * 8)
        groups: list[list[Sequence]] = [[]]
        for pair in order:
            longest = len(pair[0]) + len(pair[1])
            if groups[-1] and longest * (len(groups[-1]) + 1) > schedule.tokens:
                groups.append([])
            groups[-1].append(pair)
        chance.shuffle(groups)
        for group in groups:
            if made == schedule.steps:
                return
            made += 1
            length = max(len(prompt) + len(answer) for prompt, answer in group)
            tokens = torch.zeros(len(group), length, dtype=torch.int64)
            labels = torch.full_like(tokens, IGNORE)
            for row, (prompt, answer) in enumerate(group):
                both = len(prompt) + len(answer)
                tokens[row, :both] = torch.tensor(prompt + answer)
                labels[row, len(prompt):both] = torch.tensor(answer)
            yield tokens, labels
