"""A cold start under a limit of memory, measured in a control group and a process of its own.

Run as `python -m cloister.evaluate.limited BUNDLE`: one JSON object on the standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.errors import NotEnoughMemory, WorkerError
from cloister.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cold_start", "measure"]

TOKENS = 16  # that are answered
_ROOT = Path("/sys/fs/cgroup")
_JOIN = 'echo $$ > "$1" && shift && exec "$@"'  # before anything of the process counts
_KILLED = -9


def cold_start(bundle: Path, limit_bytes: int, *, debug: bool = False) -> dict[str, object] | None:
    """Start `bundle` in a process that may take `limit_bytes`, its pages cache included.

    Return whether it `runs`, else `why` not; `peak_bytes` of all that was charged to the limit,
    `process_peak_bytes` of the process alone, the seconds from the start of the process to the
    first token, and how often decoding a token waited for a page of the file. None where no
    control group can be made, as for a user who is not root.

    Raises:
        WorkerError: the process failed for another reason.
    """
    with _group(limit_bytes) as group:
        if group is None:
            return None
        began = time.time()
        done = subprocess.run(
            ["/bin/sh", "-c", _JOIN, "sh", str(group.processes), sys.executable, "-m",
             "cloister.evaluate.limited", str(bundle), repr(began)],
            stdout=subprocess.PIPE, stderr=None if debug else subprocess.DEVNULL, check=False)
        peak_bytes = int(group.peak.read_text())
    if done.returncode == _KILLED:
        return {"runs": False, "why": "the system ended it at the limit", "peak_bytes": peak_bytes}
    if done.returncode:
        raise WorkerError(
            f"The measuring process ended with exit status {done.returncode}; run it again with "
            "--debug to see why.")
    return {**json.loads(done.stdout), "peak_bytes": peak_bytes}


def measure(path: Path, began: float) -> dict[str, object]:
    """Load the bundle in `path` from the disk and answer; `began` is when the process was started.

    The check before loading may refuse, as it would in a program of a user.
    """
    from cloister.bundle import Bundle
    from cloister.runtime.chat import Sampling
    from cloister.runtime.engine import Engine
    from cloister.runtime.generate import Decoding, generate
    from cloister.runtime.memory import peak_bytes
    from cloister.runtime.sampling import Sampler

    for entry in Bundle.open(path).manifest.programs:
        _drop_pages(path / entry.file)
    try:
        engine = Engine(path, settings=Settings.from_environment())
    except NotEnoughMemory as error:
        return {"runs": False, "why": str(error), "process_peak_bytes": peak_bytes()}
    answer = generate(engine, [1], Decoding(sampler=Sampler(Sampling()), limit=TOKENS))
    next(answer)
    cold_start_s = time.time() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    tokens = sum(1 for _ in answer)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    return {
        "runs": True, "cold_start_s": cold_start_s, "process_peak_bytes": peak_bytes(),
        "page_faults_per_token": faults / max(1, tokens),
    }


class _Group:
    """The files of a control group of version 1 or 2."""

    def __init__(self, path: Path, *, unified: bool) -> None:
        self.path, self.processes = path, path / "cgroup.procs"
        self.limit = path / ("memory.max" if unified else "memory.limit_in_bytes")
        self.peak = path / ("memory.peak" if unified else "memory.max_usage_in_bytes")
        self.swap = path / ("memory.swap.max" if unified else "memory.swappiness")


@contextmanager
def _group(limit_bytes: int) -> Iterator[_Group | None]:
    """A new control group with a limit and no swap, or None where none can be made."""
    unified = (_ROOT / "cgroup.controllers").exists()
    path = (_ROOT if unified else _ROOT / "memory") / f"cloister-{os.getpid()}-{limit_bytes}"
    group = _Group(path, unified=unified)
    try:
        path.mkdir()
    except OSError:
        yield None
        return
    try:
        group.limit.write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # a kernel without swap
            group.swap.write_text("0")
        yield group if group.peak.exists() else None
    except PermissionError:
        yield None
    finally:
        path.rmdir()


def _drop_pages(path: Path) -> None:
    """Ask the system to forget the pages of a file: the next reads come from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), float(sys.argv[2]))))  # noqa: T201
