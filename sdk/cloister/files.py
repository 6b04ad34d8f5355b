"""Files and directories written whole: they are there entirely, or as they were before.

What is written lies beside its place until it is complete and flushed; then it is renamed there and
the directory is flushed. Disk errors come by name.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cloister.errors import NotEnoughDisk, OutputExists, OutputUnwritable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MARKS", "check_output", "disk_errors", "is_regular", "sync", "whole_directory", "whole_file",
]

# By its kind, the file that a directory of ours is known by, a JSON object with a format number.
MARKS = {"bundle": "manifest.json", "checkpoint": "config.json", "app": "embedded.json"}
_MARK_LIMIT = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(name: str) -> Iterator[None]:
    """Raise what fails while `name` is written by our names.

    Raises:
        NotEnoughDisk: the disk is full.
        OutputUnwritable: it cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NotEnoughDisk(
                f"The disk filled up while {name} was written; make room and run it again."
            ) from error
        raise OutputUnwritable(
            f"{name} cannot be written ({error.strerror or type(error).__name__}); check its "
            "directory or name another place."
        ) from error


@contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends.

    With `private` only its owner can read it, from its first byte on.

    Raises:
        NotEnoughDisk, OutputUnwritable: see `disk_errors`; what stood at `path` still does.
    """
    with disk_errors(path.name):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        part = Path(name)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor
                if not private:
                    os.fchmod(file.fileno(), 0o666 & ~_umask())
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def check_output(path: Path, *, kind: str, replace: bool) -> None:
    """Raise unless a directory of `kind`, one of `MARKS`, may be written to `path`.

    Raises:
        OutputExists: `path` is there and `replace` is false, or it is anything but such a
            directory: what is replaced is removed, so never a directory named by mistake.
        OutputUnwritable: there is no directory that it would lie in.
    """
    if not os.path.lexists(path):
        parent = path.resolve().parent
        if not parent.is_dir():
            raise OutputUnwritable(
                f"Directory {parent.name} does not exist; create it or name another output.")
        return
    if not replace:
        raise OutputExists(
            f"Output {path.name or path} exists already; name another or pass --force.")
    if path.is_symlink() or not _is_ours(path / MARKS[kind]):
        raise OutputExists(
            f"Output {path.name or path} exists and is no {kind}, so it is not replaced; name "
            "another."
        )


@contextmanager
def whole_directory(
    path: Path, *, kind: str, size_bytes: int = 0, replace: bool = False,
    private: bool = False,
) -> Iterator[Path]:
    """A directory to write into, which becomes `path` when the block ends.

    `kind` is that of `check_output`; `size_bytes` is what will be written, if known.
    With `private` only its owner can read what is in it.

    Raises:
        OutputExists: see `check_output`.
        NotEnoughDisk: less than `size_bytes` is free, or the disk filled up.
        OutputUnwritable: see `disk_errors`. On any failure what stood at `path` still does.
    """
    check_output(path, kind=kind, replace=replace)
    parent = path.resolve().parent
    with disk_errors(path.name):
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
        try:
            free = shutil.disk_usage(parent).free
            if size_bytes > free:
                raise NotEnoughDisk(
                    f"{path.name} takes {size_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
                    "free; make room or name another disk."
                )
            new, old = work / "new", work / "old"
            new.mkdir(mode=0o700 if private else 0o777)
            yield new
            for entry in (*new.iterdir(), new):
                sync(entry)
            if not os.path.lexists(path):
                new.rename(path)
            elif not _exchange(new, path):
                path.rename(old)
                new.rename(path)
            sync(parent)
        finally:
            if os.path.lexists(work / "old") and not os.path.lexists(path):
                (work / "old").rename(path)
            shutil.rmtree(work, ignore_errors=True)


def _is_ours(mark: Path) -> bool:
    """Whether `mark` is a file of ours: models that others made have a config.json, too."""
    if not is_regular(mark):
        return False
    try:
        with mark.open("rb") as file:
            record = json.loads(file.read(_MARK_LIMIT))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and type(record.get("format")) is int


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file and no link: a pipe would be waited for."""
    return path.is_file() and not path.is_symlink()


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, path: Path) -> bool:
    """Swap two entries in one step, so that `path` is never missing; false where that cannot be."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, and not every file system
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = os.fsencode(new.absolute()), os.fsencode(path.absolute())
    return renameat2 is not None and renameat2(here, names[0], here, names[1], exchange) == 0


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
