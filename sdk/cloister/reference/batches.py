"""Batches of pictures of lines, made in processes beside the training and the same by number.

Shapes: B batch, R rows, W columns.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty
from typing import TYPE_CHECKING

import numpy as np

from cloister.errors import TrainingError
from cloister.reference.drawing import HEIGHT, WIDTH
from cloister.reference.lines import LONGEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess
    from multiprocessing.queues import Queue

    from numpy.typing import NDArray

    from cloister.reference.pictures import Camera, Picture

__all__ = ["Lesson", "Pictures", "Supply", "stacked"]

_POOL = 8  # batches whose lines are drawn together and sorted by width
_MULTIPLE = 16  # columns
_SHORTEST = 10  # characters of the longest lines that a run begins with
_WAIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Grey pictures, uint8[B, R, W], and their texts."""

    x_BRW: NDArray[np.uint8]
    texts: list[str]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Which lines a run learns from: short and clean ones first."""

    rows: int  # lines of a batch
    ramp: int  # lines after which they are as long, and twice that as worn, as any
    seed: int

    def pool(self, camera: Camera, number: int) -> list[Pictures]:
        """Return the batches from `number` times their number on."""
        count = _POOL * self.rows
        grown = min(1.0, number * count / self.ramp) if self.ramp else 1.0
        worn = min(1.0, number * count / (2 * self.ramp)) if self.ramp else 1.0
        longest = round(_SHORTEST + grown * (LONGEST - _SHORTEST))
        rng = random.Random(f"lesson {self.seed} {number}")
        lines = [
            camera.line(f"{self.seed} {number} {line}", strength=worn * rng.random(),
                        longest=longest)
            for line in range(count)]
        lines.sort(key=lambda line: line.pixels_HW.shape[1])
        batches = [
            # Some are filled up to the full width, as the program's pictures are.
            stacked(lines[at:at + self.rows], WIDTH if rng.random() < 0.1 else 0)
            for at in range(0, count, self.rows)]
        rng.shuffle(batches)
        return batches


def stacked(lines: list[Picture], width: int = 0) -> Pictures:
    """Return pictures as a batch, each filled up to the widest or to `width` columns."""
    widest = max(width, *(line.pixels_HW.shape[1] for line in lines))
    x_BRW = np.full((len(lines), HEIGHT, -(-widest // _MULTIPLE) * _MULTIPLE), 255, np.uint8)
    for row_RW, line in zip(x_BRW, lines, strict=True):
        row_RW[:, :line.pixels_HW.shape[1]] = line.pixels_HW
    return Pictures(x_BRW=x_BRW, texts=[line.text for line in lines])


class Supply:
    """The batches of a lesson from number `first` on, made by `workers` processes ahead of use.

    Without workers they are made when they are asked for. The processes end with the block.
    """

    def __init__(self, camera: Camera, lesson: Lesson, first: int, workers: int) -> None:
        self.seconds = 0.0  # of the workers' processors
        self._camera, self._lesson, self._first = camera, lesson, first
        self._queues: list[Queue[tuple[list[Pictures], float]]] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        for worker in range(workers):
            queue: Queue[tuple[list[Pictures], float]] = context.Queue(2)
            process = context.Process(
                target=_work, daemon=True,
                args=(camera, lesson, first // _POOL + worker, workers, queue))
            self._queues.append(queue)
            self._processes.append(process)
        with ThreadPoolExecutor(max(1, workers)) as pool:  # each waits until its process reads
            list(pool.map(lambda process: process.start(), self._processes))

    def __enter__(self) -> Supply:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def __iter__(self) -> Iterator[Pictures]:
        """Yield the batches.

        Raises:
            TrainingError: a worker's process ended.
        """
        number, skipped = divmod(self._first, _POOL)
        while True:
            yield from self._pool(number)[skipped:]
            number, skipped = number + 1, 0

    def _pool(self, number: int) -> list[Pictures]:
        if not self._queues:
            return self._lesson.pool(self._camera, number)
        worker = (number - self._first // _POOL) % len(self._queues)
        while True:
            try:
                batches, seconds = self._queues[worker].get(timeout=_WAIT_S)
            except Empty:
                if not self._processes[worker].is_alive():
                    raise TrainingError(
                        "A process that draws lines ended; run the same command again.") from None
                continue
            self.seconds += seconds
            return batches


def _work(
    camera: Camera, lesson: Lesson, first: int, step: int,
    queue: Queue[tuple[list[Pictures], float]],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training ends first, then this
    number, began = first, time.process_time()
    while True:
        batches = lesson.pool(camera, number)
        now = time.process_time()
        queue.put((batches, now - began))
        began, number = now, number + step
