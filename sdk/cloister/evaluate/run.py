"""The evaluation of a model on a data set, by their names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister.corpus import read
from cloister.evaluate import report
from cloister.evaluate.subject import open_subject
from cloister.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloister.bundle import Bundle
    from cloister.corpus import Example
    from cloister.evaluate.report import Report
    from cloister.model.checkpoint import Checkpoint

__all__ = ["evaluate"]


def evaluate(
    model: str | Path | Bundle | Checkpoint, data: str | Path | Sequence[Example],
    *, against: str | Path | Bundle | Checkpoint | None = None, progress: Progress = silent
) -> Report:
    """Score a bundle or checkpoint on `data`, and measure its divergence from `against`.

    A bundle runs its own program. `data` is a file or directory that
    `cloister.corpus.read` can read, or examples. Answers are greedy.

    Raises:
        DataError: the data cannot be read, or a target is not what its task asks for.
        BundleError, CheckpointError, SettingError: a model cannot be used.
        ContextExceeded, VocabularyMismatch: see `cloister.evaluate.report.evaluate`.
    """
    examples = read(data) if isinstance(data, str | Path) else data
    return report.evaluate(
        open_subject(model), examples, progress=progress,
        against=None if against is None else open_subject(against))
