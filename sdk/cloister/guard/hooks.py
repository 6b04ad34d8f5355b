"""Refuse the network to Python code by an audit hook, where the system cannot do it.

Not a sandbox: CPython says so, and code in C does as it likes. It stops a library that would send
something on its own accord, and counts the attempts.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["watch"]

_ADDRESSED = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
_NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def watch() -> Callable[[], int]:
    """Refuse Internet addresses and names to Python code from now on; there is no way back.

    Returns a function that tells the number of attempts.
    """
    attempts = 0

    def hook(event: str, given: tuple[object, ...]) -> None:
        nonlocal attempts
        # An address in the file system is a string or bytes; one on a network is a tuple.
        if event in _NAMES or (event in _ADDRESSED and isinstance(given[1], tuple)):
            attempts += 1
            raise PermissionError("The network is refused to this process.")

    sys.addaudithook(hook)
    return lambda: attempts
