"""A Jupyter server as `cloister lab` starts it, of which nothing is the user's."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import NO_KEY_STORE

from cloister.settings import Settings
from cloister.vault.namespace import Kind, Namespace

__all__ = ["TOKEN", "LabServer", "connected", "keep", "settings_of", "started"]

_CONNECT = socket.socket.connect  # before each test is refused the network
TOKEN = "the-token-of-the-tests"


@dataclass
class LabServer:
    """A running server, and what lies on its disk."""

    base: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def files(self) -> Path:
        """What it shows."""
        return self.base / "files"

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.base / "log").read_text("utf-8", "replace")


def settings_of(base: Path, passphrase: str | None = None) -> Settings:
    """The settings of a server in `base`."""
    return Settings(home=base / "cloister", data=None, passphrase=passphrase)


def keep(space: Namespace, name: str, said: str) -> None:
    """Put a conversation into a vault, without a model."""
    space.append(Kind.HISTORY, name.encode(), [json.dumps(row).encode() for row in (
        {"model": "0" * 64, "system": "call", "name": name}, {"role": "user", "content": said})])


def connected(port: int) -> socket.socket:
    """A connection to a server on this machine."""
    line = socket.socket()
    _CONNECT(line, ("127.0.0.1", port))
    return line


def _listens(port: int) -> bool:
    try:
        connected(port).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def started(base: Path, *arguments: str, **variables: str) -> Iterator[LabServer]:
    """Start it, with more arguments for Jupyter, and end it with the block."""
    for name in ("files", "config", "data", "runtime", "ipython", "home"):
        (base / name).mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CLOISTER_")},
        **NO_KEY_STORE, "CLOISTER_HOME": str(settings_of(base).home), "HOME": str(base / "home"),
        "JUPYTER_CONFIG_DIR": str(base / "config"), "JUPYTER_DATA_DIR": str(base / "data"),
        "JUPYTER_RUNTIME_DIR": str(base / "runtime"), "IPYTHONDIR": str(base / "ipython"),
        "OMP_NUM_THREADS": "1", **variables,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(base), *sys.path))),
    }
    terminal, stdin = pty.openpty()  # Jupyter takes Ctrl-C for its own at a terminal alone
    with (base / "log").open("wb") as log:
        process = subprocess.Popen([
            sys.executable, "-m", "cloister.cli", "lab", "--no-browser", "--port", str(port),
            str(base / "files"), "--", "--allow-root", "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={TOKEN}", *arguments,
        ], env=environment, stdin=stdin, stdout=log, stderr=log, cwd=base)
    os.close(stdin)
    running = LabServer(base, port, process)
    try:
        deadline = time.monotonic() + 90
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < deadline, running.log
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(terminal)
