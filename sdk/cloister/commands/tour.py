"""What every demo does: say how long it takes, ask a bundle, show its speed and what comes next."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloister import display
from cloister.commands.options import Options, Record
from cloister.runtime.chat import Sampling
from cloister.runtime.client import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Demo", "Speed", "ask", "beginning", "show_next", "show_speeds"]

MAX_TOKENS = 64  # of an answer
# The likeliest continuation of a tale soon repeats itself.
_TALE = Sampling(temperature=0.7, min_p=0.15, repetition_penalty=1.1, seed=1)
_PROBE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """The options of `cloister demo`."""

    model: Path | None
    output: Path | None
    force: bool


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The speed of this machine, as busy as it is."""

    product_s: float  # of 512 rows with a matrix of 128 by 384, and back
    python_s: float  # of 20,000 turns of a loop

    @classmethod
    def measured(cls) -> Speed:
        """Measure it, in less than a second."""
        import torch

        rows, there, back = torch.randn(512, 128), torch.randn(128, 384), torch.randn(384, 128)
        return cls(product_s=_mean_s(lambda: rows @ there @ back),
                   python_s=_mean_s(lambda: sum(number * number for number in range(20_000))))


def beginning(seconds: float, of: str = "") -> str:
    """Return what a demo says before it begins; `of` is what takes so long."""
    rounded = max(10.0, round(seconds, -1))
    time_ = f"{rounded:.0f} s" if rounded < 180 else f"{seconds / 60:.0f} min"
    return f"Five stages, about {time_}{of} on this machine, as busy as it is now."


def _mean_s(work: Callable[[], object]) -> float:
    work()
    begun, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < _PROBE_S or not count:
        work()
        count += 1
    return taken / count


def ask(name: str, path: Path, requests: Sequence[Record | None], *, debug: bool) -> Record:
    """Return what the bundle at `path` answers in a process of its own, and how fast.

    A request that is None is left out; its answer is None.
    """
    with Worker(path, debug=debug) as worker:
        texts: list[str | None] = []
        speeds, peak = [], 0
        for row in requests:
            if row is None:
                texts.append(None)
                continue
            session = worker.session(system=row["system"])
            texts.append(session.ask(
                row["prompt"], max_tokens=MAX_TOKENS,
                sampling=_TALE if row["system"] == "story" else None).text)
            speeds.append(session.stats.decode_tokens_per_s or 0.0)
            peak = session.stats.peak_rss_bytes
            session.close()
        assert worker.loaded is not None
        return {
            "tier": name, "bundle_bytes": sum(f.stat().st_size for f in path.iterdir()),
            "load_s": worker.loaded.load_s, "peak_rss_bytes": peak,
            "decode_tokens_per_s": sorted(speeds)[len(speeds) // 2], "answers": texts,
        }


def show_speeds(title: str, asked: Sequence[Record]) -> None:
    """Print size, start, speed and memory of the bundles that were asked."""
    display.table(
        title, ("bundle", "size", "ready in", "tokens/s", "peak memory"),
        [(
            each["tier"], display.bytes_text(each["bundle_bytes"]), f"{each['load_s']:.2f} s",
            f"{each['decode_tokens_per_s']:,.0f}", display.bytes_text(each["peak_rss_bytes"]),
        ) for each in asked],
    )


def show_next(commands: Sequence[tuple[str, str]]) -> None:
    """Print commands to go on with, and what each is for."""
    display.show("\nNext:")
    for command, what in commands:
        display.show(f"  {command}\n      {what}")
