"""The process that has the vault open for JupyterLab's panel, and the server's end of it.

A Jupyter server has a network, and other people's extensions in it. So key and texts are in a
process of their own, which refuses itself the network before it reads anything, and writes an
export itself. It is asked by lines of JSON over a pipe, and ends, with the vault locked, when it
was not asked for a while.

Run as `python -m cloister_jupyter.keeper`; a `Keeper` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cloister import errors, guard
from cloister.commands.lab import checked
from cloister.commands.vault import FORGOTTEN
from cloister.errors import CloisterError, OutputExists, SettingError, VaultError, named
from cloister.files import whole_file
from cloister.runtime import conversation, protocol
from cloister.settings import Settings
from cloister.vault import local
from cloister.vault.keys import Provider
from cloister_jupyter.background import Idle

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloister.guard import Guard
    from cloister.vault.keys import Header
    from cloister.vault.namespace import Namespace
    from cloister.vault.store import Vault

__all__ = ["Keeper"]

_IDLE_S = 600
_END_S = 5


class Keeper:
    """The vault for a server: locked, or open in a process of its own. Threads may share it.

    Raises (from its methods):
        CloisterError: what the process raised.
        WorkerError: it ended without an answer.
    """

    def __init__(self, idle_s: float = _IDLE_S) -> None:
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._open = False
        self._idle = Idle(idle_s, self.close)  # locks the vault after a while
        self._welcome: protocol.Welcome | None = None

    @property
    def welcome(self) -> protocol.Welcome:
        """How such a process guards itself, as it said when one was last started."""
        with self._lock:
            if self._welcome is None:
                self._start()
            assert self._welcome is not None
            return self._welcome

    def state(self) -> dict[str, Any]:
        """Say whether there is a vault, who holds its key, and whether it is open."""
        header = _header()
        if header is None:
            return {"state": "none", "provider": "", "protects": "", "asks": False}
        asks = _asks(header)
        return {"state": "open" if self._alive() or not asks else "locked", "asks": asks,
                "provider": str(header.provider), "protects": header.provider.protects}

    def unlock(self, passphrase: str) -> None:
        """Open the vault with a passphrase, which is kept nowhere."""
        with self._lock:
            self._tell(do="open", passphrase=passphrase)
            self._open = True

    def ask(self, do: str, **given: str) -> dict[str, Any]:
        """Have something done, with the vault open where there is one and nobody must be asked.

        Raises:
            VaultError: it is locked.
        """
        with self._lock:
            header = _header()
            if header is not None and not self._alive():
                if _asks(header):
                    raise VaultError("The vault is locked; unlock it in the panel first.")
                self._tell(do="open", passphrase=None)
                self._open = True
            return self._tell(do=do, **given)

    def close(self) -> None:
        """Lock the vault; more than once does no harm."""
        with self._lock:
            child, self._child, self._open = self._child, None, False
            self._idle.cancel()
            if child is None:
                return
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.close()
            try:
                child.wait(_END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdout.close()

    def _alive(self) -> bool:
        child = self._child
        return self._open and child is not None and child.poll() is None

    def _start(self) -> None:
        self.close()
        self._child = subprocess.Popen(
            # -P: a module that lies in the current directory must not run beside private text.
            [sys.executable, "-P", "-m", "cloister_jupyter.keeper"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        self._welcome = msgspec.convert(self._read(), protocol.Welcome)
        self._idle.begin()

    def _tell(self, **request: str | None) -> dict[str, Any]:
        if self._child is None or self._child.poll() is not None:
            self._start()
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            raise _gone() from None
        answer = self._read()
        self._idle.begin()
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._child is not None
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self.close()
            raise _gone()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"], errors.WorkerError)(answer["message"])
        return answer


def _header() -> Header | None:
    return local.header(Settings.from_environment())


def _asks(header: Header) -> bool:
    return (header.provider is Provider.PASSPHRASE
            and Settings.from_environment().passphrase is None)


def _gone() -> errors.WorkerError:
    return errors.WorkerError("The vault's process ended without an answer; try again.")


class _Service:
    """What the process does. Requests are of our own server; their types are trusted."""

    def __init__(self, guarded: Guard) -> None:
        self._guard = guarded
        self.vault: Vault | None = None

    def answer(self, do: str, **given: Any) -> dict[str, Any]:
        """Do what is asked for."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self._open, "list": self._list, "forget": self._forget,
            "export": self._export, "check": self._check,
        }
        return actions[do](**given)

    def _open(self, passphrase: str | None) -> dict[str, Any]:
        if self.vault is None:
            self.vault = local.open_vault(None if passphrase is None else lambda: passphrase)
            # A key store is asked once more at the end, over a socket of this machine.
            if self.vault.header.provider is not Provider.KEYRING:
                self._guard = self._guard.narrow()
        return {}

    def _spaces(self) -> list[Namespace]:
        if self.vault is None:
            raise VaultError("There is no vault here; make one with `cloister vault init`.")
        return self.vault.namespaces()

    def _list(self) -> dict[str, Any]:
        conversations: list[dict[str, Any]] = []
        objects = size = 0
        for space in self._spaces():
            for each in conversation.listed(space):
                conversations.append({
                    "id": each.id, "name": each.name, "namespace": space.name,
                    "hours": each.hours, "bytes": each.size_bytes})
            for count, size_bytes in space.sizes().values():
                objects, size = objects + count, size + size_bytes
        return {"conversations": sorted(conversations, key=lambda each: each["hours"]), "others": {
            "objects": objects - len(conversations),
            "bytes": size - sum(each["bytes"] for each in conversations)}}

    def _found(self, id_: str) -> tuple[Namespace, str]:
        for space in self._spaces():
            for each in conversation.listed(space):
                if each.id == id_:
                    return space, each.name
        raise SettingError("There is no such conversation any more; look again.")

    def _forget(self, id: str) -> dict[str, Any]:  # noqa: A002  # as the page says it
        conversation.forget(*self._found(id))
        return {"residue": FORGOTTEN}

    def _export(self, id: str, path: str) -> dict[str, Any]:  # noqa: A002
        said = conversation.export(*self._found(id))
        target = Path(path)
        if os.path.lexists(target):
            raise OutputExists("There is a file of that name; choose another.")
        with whole_file(target, private=True) as file:
            file.write(json.dumps(said, indent=1).encode() + b"\n")
        return {}

    def _check(self, path: str) -> dict[str, Any]:
        return checked(Path(path), self.vault)[1]


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory = guard.keep_out_of_dumps()
    # Only our own lines may reach the server: both descriptors are moved out of everybody's way.
    lines = os.fdopen(os.dup(1), "wb")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)

    def send(value: object) -> None:
        lines.write(json.dumps(value).encode() + b"\n")
        lines.flush()

    try:
        guarded = guard.enforce(keep=(lines.fileno(),))
    except CloisterError as error:
        send({"error": type(error).__name__, "message": str(error)})
        return
    send(msgspec.to_builtins(protocol.Welcome(
        version=protocol.VERSION, guard_tier=guarded.tier, guard=guarded.reason,
        evidence=guarded.evidence, memory=memory)))
    service = _Service(guarded)
    try:
        for line in sys.stdin.buffer:
            try:
                send(service.answer(**json.loads(line)))
            except Exception as error:
                ours = named(error, "The vault's process")
                send({"error": type(ours).__name__, "message": str(ours)})
    except BrokenPipeError:  # the server is gone
        pass
    finally:
        if service.vault is not None:
            service.vault.close()


if __name__ == "__main__":
    _main()
