"""Builds the operators' library with the system's C++ compiler, and finds one that was built.

A library belongs to its sources, compiler, processor architecture and ExecuTorch. It lies in a
folder that only its owner can write to, with its sha256 beside it, and with another is not loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["ABI", "SOURCES", "Builder", "LibraryError", "objects"]

ABI = 2  # changes whenever an operator's arguments or meaning do
SOURCES = Path(__file__).parent / "cpu"
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_DOT = "-march=armv8.2-a+dotprod"
_SETS = {
    "x86_64": {
        "avx512": ("avx512.cc", *_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
                   "-mavx512vnni"),
        "avxvnni": ("avx2.cc", *_AVX2, "-mavxvnni", "-DCLOISTER_VNNI"),
        "avx2": ("avx2.cc", *_AVX2),
    },
    "aarch64": {
        "i8mm": ("neon.cc", f"{_DOT}+i8mm", "-DCLOISTER_I8MM"),
        "neon": ("neon.cc", _DOT),
    },
}


class LibraryError(Exception):
    """A library that cannot be built, or must not be loaded; the text says what to do."""


def objects(
    compiler: str, folder: Path, more: Iterable[Sequence[str]] = (), flags: Sequence[str] = (),
    machine: str | None = None,
) -> list[Path]:
    """Compile the kernels of every instruction set of `machine`, and `more` sources, into `folder`.

    `more` are sources with flags of their own.

    Raises:
        LibraryError: the compiler fails.
    """
    sets = _SETS.get(machine or platform.machine(), {})
    wanted = [
        *((f"{name}.o", command) for name, command in sets.items()),
        *((f"{Path(each[0]).stem}.o", each) for each in (["portable.cc"], ["run.cc"], *more))]

    def compiled(target: str, command: Sequence[str]) -> Path:
        source, *own = command
        _run([compiler, *_FLAGS, *flags, *own, f"-I{SOURCES}", "-c", str(SOURCES / source),
              "-o", str(folder / target)])
        return folder / target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda each: compiled(*each), wanted))


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes and finds the library in `folder`."""

    folder: Path
    executorch: Path  # the package's folder
    release: str  # of ExecuTorch
    bindings: Path  # its library for Python, which has the registry and the thread pool
    compiler: str = "c++"

    def find(self) -> Path | None:
        """Return the library of these sources, if it was built.

        Raises:
            LibraryError: the folder is open to others, or the library is not what was built.
        """
        path = self._path
        if not path.exists():
            return None
        _check(self.folder)
        try:
            expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            expected = None
        if _sha256(path) != expected:
            raise LibraryError(
                f"Library {path.name} is not the one that was built; delete it and run `cloister "
                "kernels build` again.")
        return path

    def build(self) -> Path:
        """Compile the library, unless it was built before, and return it.

        Raises:
            LibraryError: no compiler, one that fails, or a folder that is open to others.
        """
        found = self.find()
        if found is not None:
            return found
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(self.folder)
        path, include = self._path, self.executorch / "include"
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            glue = ("operators.cc", f"-I{include}",
                    f"-I{include}/executorch/runtime/core/portable_type/c10",
                    "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL")
            made = objects(self._compiler(), Path(work), [glue])
            out = Path(work, path.name)
            _run([self._compiler(), "-shared", "-o", str(out), *map(str, made), str(self.bindings),
                  f"-Wl,-rpath,{self.bindings.parent}"])
            path.with_suffix(".json").write_text(json.dumps({"sha256": _sha256(out)}))
            out.replace(path)
        return path

    def _compiler(self) -> str:
        found = shutil.which(self.compiler)
        if found is None:
            raise LibraryError(
                f"No C++ compiler is named {self.compiler!r} here; install one (Debian: g++).")
        return found

    @cached_property
    def _path(self) -> Path:
        """Where the library of these sources lies."""
        total = hashlib.sha256(f"{self.release} {platform.machine()} {_FLAGS} {_SETS}".encode())
        found = shutil.which(self.compiler)
        total.update(_run([found, "--version"]) if found else b"")
        for source in sorted(SOURCES.iterdir()):
            total.update(source.name.encode() + b"\0" + source.read_bytes())
        return self.folder / f"operators-{total.hexdigest()[:16]}.so"


def _check(folder: Path) -> None:
    """Raise LibraryError where others than the user may write to `folder`."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise LibraryError(
            f"Folder {folder.name} of operator libraries can be written to by others; run `chmod "
            "700` on it, or delete it.")


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise LibraryError(
            f"The C++ compiler failed ({lines[0]}); another one may be named by "
            "CLOISTER_COMPILER.")
    return done.stdout


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
