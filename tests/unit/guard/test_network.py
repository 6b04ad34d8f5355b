"""No way out of a guarded process, tried from inside; each way is open where the guard is off."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BEGIN = """
import ctypes, json, os, platform, socket, struct, subprocess, sys, threading
port, port6, udp, guarded = (int(word) for word in sys.argv[1:5])
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"

def guard(keep=()):
    from cloister.guard import enforce
    made = enforce(keep) if guarded else None
    assert made is None or made.tier == 2, made
    return made

def address(number):  # struct sockaddr_in
    return struct.pack("=H", socket.AF_INET) + struct.pack("!HI", number, 0x7F000001) + bytes(8)
"""


class Beacon:
    """Listens on the loopback interface; the kernel completes connections by itself."""

    def __init__(self) -> None:
        self.tcp, self.tcp6 = (socket.create_server((host, 0), family=family) for host, family in (
            ("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.sockets = (self.tcp, self.tcp6, self.udp)
        for each in self.sockets:
            each.setblocking(False)

    def seen(self) -> int:
        """Connections and datagrams since the last call."""
        count = 0
        for each in self.sockets:
            try:
                while True:
                    if each is self.udp:
                        each.recv(4096)
                    else:
                        connection, _ = each.accept()
                        connection.settimeout(5)
                        assert connection.recv(4096)
                        connection.close()
                    count += 1
            except BlockingIOError:
                continue
        return count


@pytest.fixture
def beacon() -> Iterator[Beacon]:
    made = Beacon()
    yield made
    for each in made.sockets:
        each.close()


def attempt(beacon: Beacon, program: str, *, guarded: bool) -> str:
    """Run `program` after `BEGIN` in a process of its own, and return what it printed."""
    ports = [str(each.getsockname()[1]) for each in beacon.sockets]
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program, *ports, str(int(guarded))], check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}, capture_output=True,
        text=True, timeout=60,
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


CONNECT = """
def connect():
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).sendall(b"out")
    except OSError as error:
        print(error.errno)
"""
CHILD = "import socket; socket.create_connection(('127.0.0.1', int('%d'))).sendall(b'out')"
WAYS = {
    "socket module": CONNECT + "guard(); connect()",
    "C library": """
guard()
made = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
if libc.connect(made, address(port), 16) == 0: libc.send(made, b"out", 3, 0)
""",
    "raw system call": """
guard()
made = libc.syscall(198 if ARM else 41, socket.AF_INET, socket.SOCK_STREAM, 0)
if libc.connect(made, address(port), 16) == 0: libc.send(made, b"out", 3, 0)
""",
    "high half of the family": """
guard()
made = libc.syscall(198 if ARM else 41, ctypes.c_long(1 << 32 | socket.AF_INET), ctypes.c_long(1),
                    ctypes.c_long(0))
if libc.connect(made, address(port), 16) == 0: libc.send(made, b"out", 3, 0)
""",
    "python child": f"guard(); subprocess.run([sys.executable, '-c', {CHILD!r} % port], "
                    "stderr=subprocess.DEVNULL)",
    "curl child": "guard(); subprocess.run(['curl', '-s', '-m', '2', f'http://127.0.0.1:{port}/'])",
    "fork": CONNECT + """
guard()
if (child := os.fork()) == 0:
    connect(); os._exit(0)
os.waitpid(child, 0)
""",
    "thread from before": CONNECT + """
go = threading.Event()
thread = threading.Thread(target=lambda: (go.wait(), connect()))
thread.start(); guard(); go.set(); thread.join()
""",
    "UDP": """
guard()
try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", udp))
except OSError as error: print(error.errno)
""",
    "IPv6": """
guard()
try: socket.create_connection(("::1", port6), timeout=5).sendall(b"out")
except OSError as error: print(error.errno)
""",
    "resolver": """
libc.__res_init()
libc.__res_state.restype = ctypes.c_void_p
state = libc.__res_state()  # retrans, retry, options, nscount, then the first server
ctypes.memmove(state, struct.pack("=ii", 1, 1), 8)
ctypes.memmove(state + 16, struct.pack("=i", 1), 4)
ctypes.memmove(state + 20, address(udp), 16)
guard()
libc.res_query(b"out.example.", 1, 1, ctypes.create_string_buffer(512), 512)
""",
    "inherited descriptor": """
if len(sys.argv) == 5:
    made = socket.create_connection(("127.0.0.1", port))
    subprocess.run([sys.executable, "-c", sys.orig_argv[2], *sys.argv[1:], str(made.fileno())],
                   pass_fds=[made.fileno()], check=True)
else:
    guard()
    try: os.write(int(sys.argv[5]), b"out")
    except OSError as error: print(error.errno)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
def test_a_way_out_is_closed_by_the_guard_and_open_without_it(beacon: Beacon, way: str) -> None:
    if way == "curl child" and shutil.which("curl") is None:
        way = "python child"
    if way == "inherited descriptor":  # it is connected before: what counts is what is written
        beacon.tcp.setblocking(True)
    said = attempt(beacon, WAYS[way], guarded=False)
    assert beacon.seen() if way != "inherited descriptor" else received(beacon) == b"out", said
    said = attempt(beacon, WAYS[way], guarded=True)
    assert not beacon.seen() if way != "inherited descriptor" else received(beacon) == b"", said


def received(beacon: Beacon) -> bytes:
    connection, _ = beacon.tcp.accept()
    with connection:
        return connection.recv(100)


CALLS = {  # a system call that gives something else than EACCES without the guard
    "IPv4": "libc.socket(2, 1, 0)", "IPv6": "libc.socket(10, 1, 0)",
    "IPv6 pair": "libc.socketpair(10, 1, 0, (ctypes.c_int * 2)())",
    "netlink": "libc.socket(16, 3, 0)", "packet": "libc.socket(17, 3, 0)",
    "vsock": "libc.socket(40, 1, 0)",
    "io_uring_setup": "libc.syscall(425, 1, ctypes.create_string_buffer(120))",
    "io_uring_enter": "libc.syscall(426, -1, 0, 0, 0, 0)",
    "io_uring_register": "libc.syscall(427, -1, 0, 0, 0)",
    "pidfd_getfd": "libc.syscall(438, -1, 0, 0)",
    "ptrace": "libc.ptrace(16, 0, 0, 0)",
    "process_vm_writev": "libc.process_vm_writev(0,0,0,0,0,0)",
    "x32": "libc.syscall(ctypes.c_long(0x40000000 + 41), 2, 1, 0)",
    # int 0x80 with the numbers of i386: socket(), and anything else of that ABI
    "foreign ABI": "i386(359, 2, 1, 0)", "foreign ABI, socketcall": "i386(102, 1, 0, 0)",
    "foreign ABI, getpid": "i386(20, 0, 0, 0)",
}
I386 = """
import mmap
def i386(*numbers):
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex("53" + "".join(  # push rbx; mov eax, ebx, ecx, edx; int 0x80; pop rbx
        code + struct.pack("<I", number).hex()
        for code, number in zip(("b8", "bb", "b9", "ba"), numbers))) + bytes.fromhex("cd805bc3"))
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_int)(start)()
    ctypes.set_errno(max(0, -result))
    return result
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", [
    name for name in CALLS
    if platform.machine() == "x86_64" or ("foreign" not in name and name != "x32")])
def test_a_call_is_refused_with_eacces(beacon: Beacon, call: str) -> None:
    program = I386 + f"guard(); ctypes.set_errno(0); {CALLS[call]}; print(ctypes.get_errno())"
    without = attempt(beacon, program, guarded=False)
    assert without != "13"
    assert attempt(beacon, program, guarded=True) == "13"


PASSED = """
import array
here, there = socket.socketpair()
if os.fork() == 0:  # before the guard, and so outside of it
    made = socket.create_connection(("127.0.0.1", port))
    passed = array.array("i", [made.fileno()])
    there.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
    os._exit(0)
os.wait()
made = guard(keep=[here.fileno()])
NARROW
try:
    _, extra, _, _ = here.recvmsg(1, 100)
    os.write(struct.unpack("i", extra[0][2])[0], b"out")
except OSError as error: print(error.errno)
print(made and made.evidence["local services"])
"""


def test_a_descriptor_that_a_helper_passes_is_refused_once_local_services_are(
    beacon: Beacon,
) -> None:
    """Until then it is not, and the evidence says so."""
    beacon.tcp.setblocking(True)
    program = PASSED.replace("NARROW", "")
    attempt(beacon, program, guarded=False)
    assert received(beacon) == b"out"
    assert "open" in attempt(beacon, program, guarded=True)
    assert received(beacon) == b"out"
    narrowed = PASSED.replace("NARROW", "made = made.narrow()")
    assert attempt(beacon, narrowed, guarded=True).split() == ["13", "refused"]
    assert received(beacon) == b""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_probe_says_of_each_way_whether_it_was_refused(beacon: Beacon, guarded: bool) -> None:
    found = json.loads(attempt(beacon, """
guard()
from cloister.guard import probe
print(json.dumps([(each.refused, each.how) for each in probe()]))
""", guarded=guarded))
    *network, local = found
    assert [refused for refused, _ in network] == [guarded] * 5
    assert all(how.startswith("refused (" if guarded else "NOT refused (") for _, how in network)
    assert not local[0]  # until `Guard.narrow`


def test_what_is_in_force_is_told_and_libraries_are_told_to_stay_offline(beacon: Beacon) -> None:
    program = "made = guard(); print(json.dumps([made.tier, made.reason, made.evidence]))\n" \
              "assert os.environ['HF_HUB_OFFLINE'] == '1'"
    tier, reason, evidence = json.loads(attempt(beacon, program, guarded=True))
    assert tier == 2
    assert "operating system" in reason
    assert evidence["IPv4"] == evidence["io_uring"] == "refused"
    assert evidence["inherited descriptors"].endswith("closed")


REFUSING = {  # an outer filter that takes seccomp(2) away, or a filter that does nothing
    "not allowed": "seccomp.install(seccomp.Filter(whole=('seccomp',)))",
    "no such system": "seccomp.platform.machine = lambda: 'riscv64'",
    "not in force": "seccomp.NETWORK = seccomp.Filter()",
}


@pytest.mark.parametrize("how", list(REFUSING))
def test_where_the_system_refuses_no_sockets_python_does_and_it_is_said(
    beacon: Beacon, how: str
) -> None:
    program = CONNECT + f"""
from cloister.guard import enforce, seccomp
{REFUSING[how]}
if guarded:
    made = enforce()
    assert made.tier == 1 and "hook" in made.reason and made.reason.endswith("."), made
    assert made.narrow() is made
connect()
try: socket.getaddrinfo("localhost", 80)
except PermissionError: pass
if guarded: print(made.attempts())
here, there = socket.socketpair(); here.sendall(b"x"); assert there.recv(1) == b"x"
"""
    attempt(beacon, program, guarded=False)
    assert beacon.seen() == 1
    assert attempt(beacon, program, guarded=True).split() == ["None", "2"]
    assert not beacon.seen()


def test_a_command_keeps_the_files_that_a_shell_handed_it_and_no_connection(
    beacon: Beacon, tmp_path: Path
) -> None:
    program = f"""
from cloister.guard import enforce
made = socket.create_connection(("127.0.0.1", port)); made.sendall(b"control")
local, other = socket.socketpair()
handed = os.open({str(tmp_path / "handed")!r}, os.O_WRONLY | os.O_CREAT)
if guarded: print(enforce(files=True).evidence["inherited descriptors"])
os.write(handed, b"kept"); local.sendall(b"kept")
try: made.sendall(b"out")
except OSError as error: print(error.errno == errno.EBADF)
"""
    program = "import errno\n" + program
    assert attempt(beacon, program, guarded=False) == ""
    assert attempt(beacon, program, guarded=True).split() == ["1", "closed", "True"]
    assert (tmp_path / "handed").read_bytes() == b"kept"


@pytest.mark.parametrize("stream", [0, 1, 2, 7])
def test_a_stream_that_is_a_network_connection_is_refused_by_its_number(
    beacon: Beacon, stream: int
) -> None:
    program = f"""
made = socket.create_connection(("127.0.0.1", port)); made.sendall(b"control")
told = os.dup(1)
os.dup2(made.fileno(), {stream})
from cloister.errors import GuardError
try: guard(keep=[told] if guarded else []) if {stream} < 3 else guard(keep=[told, {stream}])
except GuardError as error: os.write(told, str(error).encode())
"""
    assert attempt(beacon, program, guarded=False) == ""
    assert f"Descriptor {stream} " in attempt(beacon, program, guarded=True)


def test_what_the_worker_needs_goes_on_under_the_guard(beacon: Beacon, tmp_path: Path) -> None:
    """A vault, threads, children, and a key store behind a Unix socket, as D-Bus is reached."""
    program = f"""
from pathlib import Path
folder = Path({str(tmp_path)!r}) / str(guarded); folder.mkdir()
listener = socket.socket(socket.AF_UNIX); listener.bind(str(folder / "bus")); listener.listen()
if os.fork() == 0:
    other, _ = listener.accept(); other.sendall(other.recv(10) * 2); os._exit(0)
made = guard()
bus = socket.socket(socket.AF_UNIX); bus.connect(str(folder / "bus")); bus.sendall(b"key")
assert bus.recv(10) == b"keykey"; bus.close()
for step in range(2):
    from cloister.vault.keys import Keyholder
    from cloister.vault.namespace import Kind
    from cloister.vault.store import Vault
    holder = Keyholder(keyfile=folder / f"key{{step}}")
    with Vault.create(folder / f"vault{{step}}", holder) as vault:
        def write(n): vault.namespace().put_large(Kind.PREFIX, b"%d" % n, [b"x" * 100_000])
        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert vault.namespace().sizes()[Kind.PREFIX][0] == 4
    assert subprocess.run(["true"]).returncode == 0
    made = made and made.narrow()
"""
    attempt(beacon, program, guarded=False)
    attempt(beacon, program, guarded=True)


@pytest.mark.slow
def test_the_shipped_nano_1_answers_under_the_guard(beacon: Beacon) -> None:
    program = """
made = guard()
from cloister import Engine, Session, reference
made and made.narrow()
os.environ["CLOISTER_HOME"] = "/nonexistent"
session = Session(Engine(reference.bundle_path("nano-1"), threads=2), system="call")
print("".join(token.text for token in session.stream("play some jazz", max_tokens=16)))
"""
    free = attempt(beacon, program, guarded=False)
    assert "PlayMusic" in free
    assert attempt(beacon, program, guarded=True) == free
