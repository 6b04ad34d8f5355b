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

__all__ = ["BEGIN_ANEW", "check_place", "check_private", "file_system", "no_links", "private",
           "sync_directory", "write_failed"]

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
    """The kind of file system that holds `path`, as statfs(2) says."""
    libc = ctypes.CDLL(None, use_errno=True)  # libc, as the process has it
    buffer = (ctypes.c_long * 32)()  # f_type comes first; the structure takes 120 bytes
    if libc.statfs(os.fsencode(path), buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buffer[0] & 0xFFFFFFFF


def check_place(directory: Path, *, system: Callable[[Path], int] = file_system) -> None:
    """Nothing, where `directory` is fit for a vault.

    Raises:
        VaultUnsafe: it belongs to somebody else, others can enter it, or it lies on a network.
        VaultError: it cannot be looked at.
    """
    try:
        status = directory.stat(follow_symlinks=False)
        network = _NETWORKS.get(system(directory))
    except OSError as error:
        raise VaultError(
            f"Vault directory {directory} cannot be read ({error.strerror}); check its path and "
            "owner."
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise VaultUnsafe(f"{directory} is no directory; move it away.")
    if status.st_uid != os.geteuid():
        raise VaultUnsafe(
            f"{directory} belongs to user {status.st_uid}; run as that user, or name another "
            "directory with CLOISTER_HOME."
        )
    if status.st_mode & 0o077:
        raise VaultUnsafe(
            f"Others can enter {directory}; run `chmod 700 {shlex.quote(str(directory))}`.")
    if network is not None:
        raise VaultUnsafe(
            f"{directory} lies on a network file system ({network}); name a directory on a local "
            "disk with CLOISTER_HOME."
        )


def check_private(status: os.stat_result, path: Path) -> None:
    """Nothing, where a file is a regular one of this user that nobody else can read.

    Raises:
        VaultUnsafe: it is not.
    """
    if not stat.S_ISREG(status.st_mode):
        raise VaultUnsafe(f"{path} is no regular file; remove it.")
    if status.st_uid != os.geteuid():
        raise VaultUnsafe(
            f"{path} belongs to user {status.st_uid}; run as that user, or chown it to yours.")
    if status.st_mode & 0o077:
        raise VaultUnsafe(
            f"Others can read or write {path}; run `chmod 600 {shlex.quote(str(path))}`.")


def write_failed(error: OSError, what: str) -> CloisterError:
    """What is to be raised where `what` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NotEnoughDisk(f"The disk filled while {what} was written; make room.")
    return VaultError(
        f"{what.capitalize()} cannot be written ({error.strerror}); check the disk.")


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` last."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_links(path: str, flags: int) -> int:
    """An opener that follows no symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW)


def private(path: str, flags: int) -> int:
    """An opener of new files that nobody else can read."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
