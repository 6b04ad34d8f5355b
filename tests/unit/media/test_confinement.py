"""The process that decodes can compute and answer, and nothing else; each way is open without."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cloister.guard import seccomp

ATTEMPTS = """
import _thread, errno, json, os, resource, socket, sys, time
from cloister.media import confinement
from cloister.media.limits import Limits
sys.path.clear()
ways = {
    "reads a file": lambda: open("/etc/hostname").close(),
    "lists a directory": lambda: os.listdir("/"),
    "writes a file": lambda: open(sys.argv[2], "w").close(),
    "looks a path up": lambda: os.stat("/etc/hostname"),
    "deletes a file": lambda: os.unlink(sys.argv[2]),
    "makes a socket": lambda: socket.socket().close(),
    "makes a local socket": lambda: socket.socketpair(),
    "makes a pipe": lambda: os.pipe(),
    "forks": lambda: os.fork() or os._exit(0),
    "starts a thread": lambda: _thread.start_new_thread(time.sleep, (60,)),
    "executes a program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "signals another process": lambda: os.kill(os.getppid(), 0),
    "asks who runs it": lambda: os.uname(),
}
resource.getrusage(resource.RUSAGE_SELF)
exec(sys.argv[1])
for name in ways:
    try:
        ways[name]()
    except (OSError, RuntimeError) as error:
        ways[name] = "refused"
    else:
        ways[name] = "open"
big = []
try:
    big = bytearray(200 << 20)
except MemoryError:
    big = None
ways["takes 200 MB of memory"] = "refused" if big is None else "open"
print(json.dumps(ways), flush=True)
os._exit(0)  # a thread that ends asks for a library that cannot be opened any more
"""
CONFINE = "confinement.confine(Limits(memory_bytes=100 << 20))"
WITHOUT_FILTER = f"""
def refuse(filter_): raise OSError
confinement.seccomp.install = refuse
{CONFINE}
"""
LINUX = pytest.mark.skipif(seccomp.architecture() is None, reason="no system call filter is known")


def attempt(begin: str, path: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, begin, path], capture_output=True, check=True)
    return json.loads(done.stdout)


@LINUX
def test_a_confined_process_reaches_nothing(tmp_path) -> None:
    control = attempt("pass", str(tmp_path / "new"))
    assert set(control.values()) == {"open"}
    found = attempt(CONFINE, str(tmp_path / "new"))
    assert set(found.values()) == {"refused"}


def test_without_a_filter_nothing_is_opened_all_the_same(tmp_path) -> None:
    found = attempt(WITHOUT_FILTER, str(tmp_path / "new"))
    refused = {name for name, how in found.items() if how == "refused"}
    assert refused >= {
        "reads a file", "lists a directory", "writes a file", "makes a socket",
        "makes a local socket", "makes a pipe"}


def test_no_byte_is_written_to_a_file_that_was_open(tmp_path) -> None:
    program = ("import os, sys; file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
               "from cloister.media import confinement; from cloister.media.limits import Limits\n"
               "os.write(file, b'before'); " + CONFINE + "; os.write(file, b'after')")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=False)
    assert done.returncode != 0
    assert (tmp_path / "file").read_bytes() == b"before"


@LINUX
def test_what_is_not_listed_is_refused_by_every_abi_and_21_calls_are() -> None:
    assert len(seccomp.COMPUTE.only) == 21
    program = """
import ctypes, os
from cloister.guard import seccomp
seccomp.install(seccomp.COMPUTE)
libc = ctypes.CDLL(None, use_errno=True)
refused = [seccomp.refused(name, -1) for name in
           ("socket", "connect", "ptrace", "seccomp", "io_uring_setup", "sendmsg")]
os.write(1, repr(set(refused)).encode())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"{True}"
