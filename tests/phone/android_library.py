"""ExecuTorch's stock runner out of an Android library, as a program of this machine.

npm's react-native-executorch brings Android's library for x86-64, which has ExecuTorch 1.2 with the
switches of phone builds, XNNPACK's weights cache among them. Debian's C library has almost all that
it asks of Android's: `bionic/shim.c` has the rest. Wanted are npm, and Debian's clang-19 and
libc++-19-dev.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.phone.golden import Spoken

from cloister.bundle import Bundle

PACKAGE = "react-native-executorch@0.9.3"
MEMBER = "package/third-party/android/libs/executorch/x86_64/libexecutorch.so"
SHA256 = "2fd1d48f45259a73a12cd8ec4aa42fffa70f27d383254b86576c899eb1d59e57"
LOADS = ("file", "mapped")
_NAME = "libexecutorch_jni.so"  # its own name for itself
_LIBCXX = Path("/usr/lib/llvm-19/include/c++/v1")


def missing() -> str:
    """Return what this machine lacks to build the runner, or nothing."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "a Linux on x86-64"
    lacking = [tool for tool in ("npm", "clang-19", "clang++-19") if not shutil.which(tool)]
    return ", ".join(lacking if _LIBCXX.is_dir() else [*lacking, "libc++-19-dev"])


def build(folder: Path) -> Path:
    """Return the runner, built in `folder`, where the library goes, too."""
    shutil.copytree(Path(__file__).parent / "bionic", folder, dirs_exist_ok=True)
    (folder / _NAME).write_bytes(for_debian(fetched()))
    site = (_LIBCXX / "__config_site").read_text()
    (folder / "__config_site").write_text(
        site.replace("_LIBCPP_ABI_NAMESPACE __1", "_LIBCPP_ABI_NAMESPACE __ndk1"))
    for command in (
        "clang-19 -O1 -shared -fPIC shim.c -o libshim.so",
        f"clang++-19 -std=c++17 -O1 -fno-exceptions -nostdinc++ -isystem . -isystem {_LIBCXX}"
        " -c runner.cpp -o runner.o",
        "clang++-19 -nostdlib++ runner.o -o runner -L. -lshim -lexecutorch_jni -lm"
        " -Wl,-rpath,$ORIGIN,--allow-shlib-undefined",
    ):
        subprocess.run(command.split(), cwd=folder, check=True)
    return folder / "runner"


def answers(runner: Path, bundle: Bundle, asked: Sequence[Spoken], load: str,
            program: Path | None = None) -> list[str]:
    """Return what the runner says to every prompt, by a bundle's program or another.

    Raises:
        ChildProcessError: a signal ended it, or it gave up; which is said.
    """
    program = program or bundle.path / bundle.manifest.programs[0].file
    done = subprocess.run(
        [runner, program, bundle.tokenizer_path, load], capture_output=True, timeout=300,
        input="".join(f"{row.tokens}\0{row.prompt}\0" for row in asked).encode())
    if done.returncode:
        raise ChildProcessError(signal.Signals(-done.returncode).name if done.returncode < 0
                                else f"exit code {done.returncode}")
    return done.stdout.decode(errors="replace").split("\0")[:-1]


def fetched() -> bytes:
    """Return the library as npm's package has it, kept in CLOISTER_TEST_CACHE where that is set."""
    kept = os.environ.get("CLOISTER_TEST_CACHE")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as work:
        file = Path(kept or work, f"{PACKAGE}-x86_64.so")
        if not file.is_file():
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, check=True, timeout=540,
                           capture_output=True)
            (packed,) = Path(work).glob("*.tgz")
            with tarfile.open(packed) as archive:
                found = archive.extractfile(MEMBER)
                assert found is not None
                Path(work, "library").write_bytes(found.read())
            Path(work, "library").replace(file)  # whole: another process may look for it
        library = file.read_bytes()
    assert hashlib.sha256(library).hexdigest() == SHA256, f"{file} is not what was recorded"
    return library


def for_debian(library: bytes) -> bytes:
    """Return it without the names of Android's libraries and the versions of their symbols.

    What it asks of them is then looked for in whatever its program has loaded, when it is first
    called: the 27 names of fbjni never are. Of a name without version glibc has the oldest. Binding
    that late writes into a table which is read-only after loading (RELRO), so that goes as well.
    """
    needed, flags, versions = {1}, {30, 0x6FFFFFFB}, {0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF}
    dynamic, relro, none = 2, 0x6474E552, 0
    out = bytearray(library)
    (headers,), (count,) = struct.unpack_from("<Q", out, 32), struct.unpack_from("<H", out, 56)
    for header in range(headers, headers + 56 * count, 56):
        kind, _, at, _, _, size, _, _ = struct.unpack_from("<IIQQQQQQ", out, header)
        if kind == relro:
            struct.pack_into("<I", out, header, none)
        if kind == dynamic:
            entries = struct.iter_unpack("<QQ", out[at:at + size])
            kept = b"".join(struct.pack("<QQ", *entry) for entry in entries
                            if entry[0] not in needed | flags | versions)
            out[at:at + size] = kept.ljust(size, b"\0")
    return bytes(out)
