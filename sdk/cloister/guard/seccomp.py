"""System call filters of Linux (seccomp(2)), installed by ctypes and without privilege.

A filter holds for every thread of the process and for all children, and cannot be taken off. It
sees numbers and not what pointers point to: which *kind* of socket is made, but not where a socket
connects to or what a message carries.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys
from dataclasses import dataclass

__all__ = ["COMPUTE", "NETWORK", "SOCKETS", "Filter", "architecture", "install", "refused"]

# linux/audit.h, and asm/unistd.h for the numbers that are not the same everywhere.
_ARCHITECTURES = {
    "x86_64": (0xC000003E, {
        "socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "recvmsg": 47, "bind": 49,
        "socketpair": 53, "ptrace": 101, "recvmmsg": 299, "sendmmsg": 307,
        "process_vm_writev": 311, "seccomp": 317,
        "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10,
        "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "exit": 60, "sigaltstack": 131,
        "futex": 202, "clock_gettime": 228, "exit_group": 231, "getrandom": 318,
    }),
    "aarch64": (0xC00000B7, {
        "socket": 198, "socketpair": 199, "bind": 200, "connect": 203, "sendto": 206,
        "sendmsg": 211, "recvmsg": 212, "ptrace": 117, "recvmmsg": 243, "sendmmsg": 269,
        "process_vm_writev": 271, "seccomp": 277,
        "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222,
        "mprotect": 226, "munmap": 215, "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135,
        "rt_sigreturn": 139, "sched_yield": 124, "mremap": 216, "madvise": 233, "exit": 93,
        "sigaltstack": 132, "futex": 98, "clock_gettime": 113, "exit_group": 94, "getrandom": 278,
    }),
}
_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438,
}
_X32 = 0x4000_0000  # numbers from here on are the x32 ABI's, under x86-64's own mark

# linux/bpf_common.h, linux/filter.h; offsets of struct seccomp_data.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # the low half: both architectures are little-endian
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0000 | errno.EACCES
_SET_MODE_FILTER, _TSYNC, _PR_SET_NO_NEW_PRIVS = 1, 1, 38


@dataclass(frozen=True, kw_only=True)
class Filter:
    """System calls that are refused with EACCES, by whatever ABI they are made."""

    whole: tuple[str, ...] = ()  # names
    unix_only: tuple[str, ...] = ()  # refused unless their first argument is AF_UNIX
    only: tuple[str, ...] = ()  # where it names any, all others are refused, too


# io_uring makes and connects sockets past every filter. The last three act through a process
# without a filter, or take a socket from it.
NETWORK = Filter(
    whole=("io_uring_setup", "io_uring_enter", "io_uring_register", "ptrace", "process_vm_writev",
           "pidfd_getfd"),
    unix_only=("socket", "socketpair"),
)
# No local service either, which might act for this process or hand it a connected socket.
SOCKETS = Filter(
    whole=("socket", "connect", "bind", "sendto", "sendmsg", "sendmmsg", "recvmsg", "recvmmsg"))
# Compute, and use what is open: no file, socket, pipe, process or thread is made, nobody signalled.
COMPUTE = Filter(
    only=("read", "write", "close", "fstat", "lseek", "mmap", "mprotect", "munmap", "brk",
          "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_yield", "mremap", "madvise",
          "exit", "sigaltstack", "futex", "clock_gettime", "exit_group", "getrandom"))


def architecture() -> str | None:
    """The name of this machine's system call ABI; None where no filter is known for it."""
    name = platform.machine()
    known = sys.platform == "linux" and name in _ARCHITECTURES and sys.maxsize > 1 << 32
    return name if known else None


def install(filter_: Filter) -> None:
    """Put `filter_` in force, for all threads.

    Raises:
        OSError: the system does not allow it, or does not know how.
    """
    name = architecture()
    if name is None:
        raise OSError(errno.ENOSYS, f"no filter for {sys.platform} on {platform.machine()}")
    code = b"".join(struct.pack("=HBBI", *line) for line in _program(name, filter_))
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _last_error()
    done = libc.syscall(
        ctypes.c_long(_number(name, "seccomp")), ctypes.c_ulong(_SET_MODE_FILTER),
        ctypes.c_ulong(_TSYNC), ctypes.c_char_p(program))
    if done < 0:
        raise _last_error()
    if done:
        raise OSError(errno.EBUSY, f"thread {done} has a filter of its own")


def refused(name: str, *arguments: int) -> bool:
    """Whether the system call `name`, made now, is refused with EACCES."""
    abi = architecture()
    if abi is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.syscall(
        ctypes.c_long(_number(abi, name)), *(ctypes.c_long(argument) for argument in arguments))
    if done >= 0 and name == "socket":
        os.close(done)
    return done < 0 and ctypes.get_errno() == errno.EACCES


def _number(name: str, call: str) -> int:
    return _EVERYWHERE.get(call) or _ARCHITECTURES[name][1][call]


def _program(name: str, filter_: Filter) -> list[tuple[int, int, int, int]]:
    """Instructions: code, lines to skip where true and where false, and a constant."""
    refuse = (_RETURN, 0, 0, _REFUSE)
    lines = [
        (_LOAD, 0, 0, _ARCH),
        # Another ABI has other numbers, and socketcall(2): all of it is refused.
        (_EQUAL, 1, 0, _ARCHITECTURES[name][0]), refuse,
        (_LOAD, 0, 0, _NUMBER),
    ]
    if name == "x86_64":
        lines += [(_AT_LEAST, 0, 1, _X32), refuse]
    for call in filter_.whole:
        lines += [(_EQUAL, 0, 1, _number(name, call)), refuse]
    for call in filter_.unix_only:
        lines += [
            (_EQUAL, 0, 4, _number(name, call)), (_LOAD, 0, 0, _FIRST_ARGUMENT),
            (_EQUAL, 0, 1, int(socket.AF_UNIX)), (_RETURN, 0, 0, _ALLOW), refuse,
        ]
    for call in filter_.only:
        lines += [(_EQUAL, 0, 1, _number(name, call)), (_RETURN, 0, 0, _ALLOW)]
    return [*lines, refuse if filter_.only else (_RETURN, 0, 0, _ALLOW)]


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
