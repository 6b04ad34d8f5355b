"""Where a vault may lie: a directory of this user alone, on a disk of this machine."""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import stat
from typing import TYPE_CHECKING

from cloister.errors import CloisterError, NotEnoughDisk, VaultError, VaultUnsafe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = [
    "BEGIN_ANEW", "check_home", "check_place", "check_private", "file_system", "private",
    "write_failed",
]

# The end of a sentence about a vault that cannot be opened.
BEGIN_ANEW = "leave the vault as it is and begin an empty one with `cloister vault init --beside`"

# linux/magic.h. On these SQLite's shared memory and locks do not hold between machines
# (sqlite.org/wal.html), and what is written is seen by who runs the server.
_NETWORKS = {
    0x6969: "NFS", 0x517B: "SMB", 0xFF534D42: "CIFS", 0xFE534D42: "SMB2", 0x5346414F: "AFS",
    0x73757245: "Coda", 0x00C36400: "Ceph", 0x0BD00BD0: "Lustre", 0x01021997: "9P",
    0x564C: "NCP",
}


def file_system(path: Path) -> int:
    """Return the type of the file system of `path`, as statfs(2) numbers it."""
    libc = ctypes.CDLL(None, use_errno=True)  # libc, as the process has it
    buffer = (ctypes.c_long * 32)()  # f_type comes first; the structure takes 120 bytes
    if libc.statfs(os.fsencode(path), buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buffer[0] & 0xFFFFFFFF


def check_home(home: Path, *, mend: bool = False) -> bool:
    """Raise unless nobody else can put another vault in the place of the one in `home`.

    With `mend` a directory of this user's is closed to others; whether that was needed.

    Raises:
        VaultUnsafe: it belongs to another user, or others can write to it.
        VaultError: it cannot be looked at.
    """
    try:
        status = home.stat()
    except OSError as error:
        raise _unreadable(home, error) from None
    if status.st_uid:  # root may replace everything anyway
        _check_owner(status, home)
    if not status.st_mode & 0o022 or status.st_mode & stat.S_ISVTX:
        return False
    if not mend or status.st_uid != os.geteuid():
        raise VaultUnsafe(
            f"Others can write to {home}, where the vault lies; run "
            f"`chmod go-w {shlex.quote(str(home))}`.")
    home.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    return True


def check_place(directory: Path, *, system: Callable[[Path], int] = file_system) -> None:
    """Raise unless `directory` is fit for a vault.

    Raises:
        VaultUnsafe: it belongs to another user, others can enter it, or it lies on a network.
        VaultError: it cannot be looked at.
    """
    try:
        status = directory.stat(follow_symlinks=False)
        network = _NETWORKS.get(system(directory))
    except OSError as error:
        raise _unreadable(directory, error) from None
    if not stat.S_ISDIR(status.st_mode):
        raise VaultUnsafe(f"{directory} is no directory; move it away.")
    _check_owner(status, directory)
    if status.st_mode & 0o077:
        raise VaultUnsafe(
            f"Others can enter {directory}; run `chmod 700 {shlex.quote(str(directory))}`.")
    if network is not None:
        raise VaultUnsafe(
            f"{directory} lies on a network file system ({network}); name a directory on a local "
            "disk with CLOISTER_HOME."
        )


def check_private(status: os.stat_result, path: Path) -> None:
    """Raise unless a file is a regular one of this user that nobody else can read.

    Raises:
        VaultUnsafe: it is not.
    """
    if not stat.S_ISREG(status.st_mode):
        raise VaultUnsafe(f"{path} is no regular file; remove it.")
    _check_owner(status, path)
    if status.st_mode & 0o077:
        raise VaultUnsafe(
            f"Others can read or write {path}; run `chmod 600 {shlex.quote(str(path))}`.")


def _unreadable(directory: Path, error: OSError) -> VaultError:
    return VaultError(
        f"Directory {directory} cannot be read ({error.strerror}); check its path and owner.")


def _check_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid():
        raise VaultUnsafe(
            f"{path} belongs to user {status.st_uid}; run as that user, make it yours, or name "
            "another directory with CLOISTER_HOME."
        )


def write_failed(error: OSError, what: str) -> CloisterError:
    """Return the error to raise where `what` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NotEnoughDisk(f"The disk filled while {what} was written; make room.")
    return VaultError(
        f"{what.capitalize()} cannot be written ({error.strerror}); check the disk.")


def private(path: str, flags: int) -> int:
    """Open without following a link or waiting for a pipe; what is made, only its owner can read.

    An opener for `open`.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
