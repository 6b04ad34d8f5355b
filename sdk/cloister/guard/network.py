"""Deny this process the network, and say how far that holds.

| tier | holds against |
|---|---|
| 2 | what runs in this process and its children: the kernel refuses all sockets but AF_UNIX |
| 1 | Python code |
| 0 | libraries that heed their own offline settings |

Tier 2 is said only where a socket was tried and refused. It is no sandbox for hostile code: that
can still write files of the user's, or ask a program without a guard, until `Guard.narrow`.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.errors import GuardError
from cloister.guard import hooks, seccomp

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = ["Guard", "close_inherited", "enforce"]

_STANDARD = (0, 1, 2)
_OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
}
# linux/socket.h: INET, INET6, NETLINK, PACKET, VSOCK, and one that does not exist.
_FAMILIES = {"IPv4": 2, "IPv6": 10, "netlink": 16, "packet": 17, "vsock": 40, "any other": 45}
_LOCAL_SERVICES = (
    "open: a local service that is reached over a Unix socket (system bus, name resolution) could "
    "use the network for this process or pass it a connected socket"
)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What is in force in this process, and in its children."""

    tier: int
    reason: str  # why it is this tier, in words
    evidence: dict[str, str]  # what was tried or done, and how it went
    attempts: Callable[[], int] = field(default=lambda: 0, repr=False)  # seen at tier 1

    def narrow(self) -> Guard:
        """Refuse Unix sockets too: no local service can act for this process any more.

        For when the system's key store has been asked for the last time, or is not used: it is
        reached over a Unix socket. Pipes and open files go on working. At a lower tier than 2
        nothing changes.
        """
        if self.tier < 2:
            return self
        try:
            seccomp.install(seccomp.SOCKETS)
        except OSError as error:
            return self._with("local services", f"{_LOCAL_SERVICES} ({error.strerror})")
        if not (seccomp.refused("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
                and seccomp.refused("recvmsg", -1, 0, 0)):
            return self._with("local services", _LOCAL_SERVICES)
        return self._with("local services", "refused")

    def _with(self, name: str, how: str) -> Guard:
        return replace(self, evidence={**self.evidence, name: how})


def enforce(keep: Collection[int] = (), *, files: bool = False) -> Guard:
    """Close what was inherited but `keep` and the standard streams, and deny the network.

    To be called before anything private is read. There is no way back. Where the system does not
    allow it, the tier and the reason say so. With `files` only network connections are closed: a
    shell hands files and pipes to a command.

    Raises:
        GuardError: a standard stream, or one of `keep`, is a network connection.
    """
    closed = close_inherited(keep, files=files)
    os.environ.update(_OFFLINE)
    evidence = {
        "inherited descriptors": f"{closed} closed",
        "libraries": "told by the environment to stay offline",
    }
    try:
        seccomp.install(seccomp.NETWORK)
    except OSError as error:
        return Guard(
            tier=1, attempts=hooks.watch(), evidence=evidence,
            reason=f"This system refuses no sockets ({error.strerror}); an audit hook of Python "
                   "does, which code in C can pass by.")
    evidence |= {name: _tried(family) for name, family in _FAMILIES.items()} | {
        "io_uring": "refused" if seccomp.refused("io_uring_setup", 1, 0) else "open"}
    through = [name for name, how in evidence.items() if how == "open"]
    evidence["local services"] = _LOCAL_SERVICES
    if through:
        return Guard(
            tier=1, attempts=hooks.watch(), evidence=evidence,
            reason=f"The filter was taken and does not refuse {', '.join(through)}; an audit hook "
                   "of Python does, which code in C can pass by.")
    return Guard(
        tier=2, evidence=evidence,
        reason="The operating system refuses this process and its children every socket but local "
               "ones.")


def close_inherited(keep: Collection[int] = (), *, files: bool = False) -> int:
    """Close every open descriptor but the standard streams and `keep`; the number of them.

    With `files` only network connections.

    Raises:
        GuardError: one that stays is a network connection, or it cannot be told.
    """
    stay = {*_STANDARD, *keep}
    for descriptor in sorted(stay):
        if not files and _is_networked(descriptor):
            raise GuardError(
                f"Descriptor {descriptor} of this process is a network connection; start it with "
                "pipes, files or a terminal in its place."
            )
    try:
        found = [int(path.name) for path in Path("/dev/fd").iterdir()]
    except OSError as error:
        raise GuardError(
            f"The open descriptors of this process cannot be listed ({error.strerror}); mount "
            "/proc or /dev/fd."
        ) from None
    closed = 0
    for descriptor in found:
        if descriptor not in stay and (not files or _is_networked(descriptor)):
            try:
                os.close(descriptor)
            except OSError:  # the one that the list was read through
                continue
            closed += 1
    return closed


def _is_networked(descriptor: int) -> bool:
    """Whether an open descriptor is a socket of another family than AF_UNIX."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
    except OSError:  # not open
        return False
    try:
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            return copy.family != socket.AF_UNIX
    except OSError:  # it cannot be told
        return True


def _tried(family: int) -> str:
    return "refused" if seccomp.refused("socket", family, socket.SOCK_DGRAM, 0) else "open"
