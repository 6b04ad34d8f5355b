"""Try to leave this process, now, and tell of each way whether the system refused it.

Addresses are those that are kept for documentation (RFC 5737, RFC 3849): nobody answers there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Attempt", "probe"]

_IPV4, _IPV6, _NAME, _PORT = "192.0.2.1", "2001:db8::1", "example.com", 443
_TIMEOUT_S = 1.0  # for each way that is not refused


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way out that was tried."""

    name: str
    refused: bool  # by this system, before anything left
    how: str  # in words


def probe() -> tuple[Attempt, ...]:
    """Try every way; a second or two for each that is not refused."""
    return tuple(_tried(name, leave) for name, leave in (
        (f"connection to {_IPV4} (IPv4)", lambda: _connect(socket.AF_INET, _IPV4)),
        (f"connection to {_IPV6} (IPv6)", lambda: _connect(socket.AF_INET6, _IPV6)),
        (f"datagram to {_IPV4}", _send),
        (f"look-up of the name {_NAME}", _look_up),
        ("socket made by C code, past Python", _by_c),
        ("socket to local services", lambda: socket.socket(socket.AF_UNIX).close()),
    ))


def _tried(name: str, leave: Callable[[], None]) -> Attempt:
    """Leave on a thread of its own: a resolver may take its time."""
    outcome = ["no answer in time"]
    refused: list[bool] = []

    def run() -> None:
        try:
            leave()
            outcome[0] = "it went through"
        except PermissionError as error:
            outcome[0] = error.strerror or str(error).rstrip(".")
            refused.append(True)
        except OSError as error:
            outcome[0] = error.strerror or str(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * _TIMEOUT_S)
    return Attempt(name=name, refused=bool(refused), how=(
        "refused" if refused else "NOT refused") + f" ({outcome[0]})")


def _connect(family: socket.AddressFamily, address: str) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as made:
        made.settimeout(_TIMEOUT_S)
        made.connect((address, _PORT))


def _send() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.sendto(b"\0", (_IPV4, _PORT))


def _look_up() -> None:
    try:
        socket.getaddrinfo(_NAME, _PORT)
    except socket.gaierror:  # says the same where there is no network as where it is refused
        _send()
        raise


def _by_c() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    made = libc.socket(int(socket.AF_INET), int(socket.SOCK_STREAM), 0)
    if made < 0:
        code = ctypes.get_errno()
        raise (PermissionError if code in (errno.EACCES, errno.EPERM) else OSError)(
            code, os.strerror(code))
    os.close(made)
