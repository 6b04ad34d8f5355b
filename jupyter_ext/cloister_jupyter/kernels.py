"""Kernels as `cloister lab` starts them: their input is not on the disk, nor read at a port.

They do open one, on loopback: ipykernel's IOPubThread (iostream.py, 7.4) takes what processes that
the kernel forked print there, and sends nothing out of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_runtime_dir
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from traitlets import default

__all__ = ["PrivateKernelManager"]

# struct sockaddr_un has 108 bytes, on macOS 104, one of them zero; names are kernel-UUID-ipc-N.
_LONGEST_PATH = 103
_NAME = "kernel-00000000-0000-0000-0000-000000000000-ipc-5"


class PrivateKernelManager(ServerKernelManager):
    """Starts IPython with its history in memory, and talks to kernels over Unix sockets.

    Every user of a machine may connect to a port on loopback, and reads along what a kernel
    publishes there; sockets lie in a directory that is the user's alone.
    """

    @default("transport")
    def _transport_default(self) -> str:
        path = Path(jupyter_runtime_dir()) / _NAME
        return "ipc" if os.name == "posix" and len(os.fsencode(path)) <= _LONGEST_PATH else "tcp"

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """Return the command, which another language's kernel gets as it was."""
        command: list[Any] = super().format_kernel_cmd(extra_arguments)
        if any("ipykernel" in word for word in command):
            command.append("--HistoryManager.hist_file=:memory:")
        return command
