"""A plain trainer: cross-entropy on the answers, nothing else.

Shapes: B batch, T positions.
"""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional

from cloister.errors import SettingError
from cloister.model.cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cloister.model.transformer import Decoder

__all__ = ["Pair", "Run", "Schedule", "train"]

IGNORE = -100  # label of a token that is not to be learnt

Pair = tuple[list[int], list[int]]
"""Prompt ids and answer ids."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train.

    Raises:
        SettingError: a value outside its bound.
    """

    steps: int
    tokens: int = 4096  # a batch, padding included
    peak: float = 3e-3  # learning rate
    warmup: int = 50  # steps
    weight_decay: float = 0.05
    seed: int = 0
    save_every: int = 100  # steps

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("tokens", 1), ("warmup", 0), ("weight_decay", 0),
                            ("save_every", 1)):
            if not getattr(self, name) >= least:
                raise SettingError(
                    f"{name} is {getattr(self, name)}; it must be at least {least}."
                )
        if not 0 < self.peak < 1:
            raise SettingError(f"peak is {self.peak}; it must lie between 0 and 1.")

    def rate(self, step: int) -> float:
        """Learning rate of `step`: linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(kw_only=True)
class Run:
    """What training cost, kills and restarts included."""

    losses: list[float] = field(default_factory=list)  # nats a token, one a step
    seconds: float = 0.0


def train(decoder: Decoder, data: list[Pair], schedule: Schedule, state: Path) -> Run:
    """Train `decoder` in place.

    The file `state` holds what is needed to go on after a kill: the same losses follow.

    Raises:
        SettingError: no data, or `state` was left by another schedule.
    """
    if not data:
        raise SettingError("There are no examples to train on; name other data.")
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=schedule.peak, betas=(0.9, 0.95),
        weight_decay=schedule.weight_decay,
    )
    run = Run()
    if state.exists():
        held = torch.load(state, weights_only=True)
        if held["schedule"] != asdict(schedule):
            raise SettingError(
                f"{state.name} was left by a run with another schedule; repeat that one, or "
                "delete the file."
            )
        decoder.load_state_dict(held["decoder"])
        optimizer.load_state_dict(held["optimizer"])
        run = Run(losses=held["losses"], seconds=held["seconds"])
    before, began = run.seconds, time.perf_counter()
    decoder.train()
    with Progress(
        TextColumn("training"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("", total=schedule.steps, note="")
        for step, (tokens_BT, labels_BT) in enumerate(_batches(data, schedule)):
            if step < len(run.losses):  # the batches of a resumed run come from the same dice
                continue
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            run.losses.append(_learn(decoder, optimizer, tokens_BT, labels_BT))
            last, run.seconds = run.seconds, before + time.perf_counter() - began
            speed = tokens_BT.numel() / (run.seconds - last)
            bar.update(
                task, completed=step + 1,
                note=f"loss {run.losses[-1]:.4f}, {speed:,.0f} tokens/s",
            )
            if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
                _save(state, decoder, optimizer, schedule, run)
    decoder.eval()
    return run


def _learn(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    tokens_BT: torch.Tensor,
    labels_BT: torch.Tensor,
) -> float:
    """One step; its loss."""
    labels = labels_BT[:, 1:]
    learnt = labels != IGNORE
    with torch.autocast("cpu", torch.bfloat16):
        rows = decoder.hidden(tokens_BT, 0, KVCache(decoder.config))[:, :-1]
        logits = decoder.logits(rows[learnt])
    loss = functional.cross_entropy(logits.float(), labels[learnt])
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _save(
    state: Path, decoder: Decoder, optimizer: torch.optim.Optimizer, schedule: Schedule, run: Run
) -> None:
    part = state.with_suffix(".part")
    torch.save(
        {
            "decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(),
            "schedule": asdict(schedule), "losses": run.losses, "seconds": run.seconds,
        },
        part,
    )
    os.replace(part, state)  # noqa: PTH105  # the atomic one, by its name


def _batches(
    data: list[Pair], schedule: Schedule
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels, int64[B, T], of examples of like length; passes reshuffle."""
    chance = random.Random(schedule.seed)  # not for secrets
    made = 0
    while True:
        order = sorted(data, key=lambda pair: len(pair[0]) + len(pair[1]) + chance.random() * 8)
        groups: list[list[Pair]] = [[]]
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
