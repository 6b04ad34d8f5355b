"""Builds the operators' library with the system's C++ compiler, and finds one that was built.

A library belongs to its sources, compiler, processor architecture and ExecuTorch. It lies in a
folder that only its owner can write to, or within the installed package where the wheel was made
with one; its sha256 is beside it, and with another it is not loaded.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["ABI", "PACKAGED", "SOURCES", "Builder", "LibraryError", "glue", "objects"]

ABI = 2  # changes whenever an operator's arguments or meaning do
SOURCES = Path(__file__).parent / "cpu"
PACKAGED = Path(__file__).parent / "packaged"  # where a wheel may have a library
_BUILD = json.loads((SOURCES / "build.json").read_text("utf-8"))  # CMakeLists.txt reads it, too
_FLAGS: list[str] = _BUILD["flags"]
_SETS: dict[str, dict[str, dict[str, Any]]] = _BUILD["sets"]


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
        *((f"{name}.o", [each["source"], *each["flags"]]) for name, each in sets.items()),
        *((f"{Path(each[0]).stem}.o", each) for each in (["portable.cc"], ["run.cc"], *more))]

    def compiled(target: str, command: Sequence[str]) -> Path:
        source, *own = command
        _run([compiler, *_FLAGS, *flags, *own, f"-I{SOURCES}", "-c", str(SOURCES / source),
              "-o", str(folder / target)])
        return folder / target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda each: compiled(*each), wanted))


def glue(executorch: Path, source: str = "operators.cc") -> list[str]:
    """Return a source that ExecuTorch's headers are for, and what it is compiled with."""
    include = executorch / "include"
    return [source, f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10",
            "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL"]


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes and finds the library in `folder`."""

    folder: Path
    executorch: Path  # the package's folder
    release: str  # of ExecuTorch
    bindings: Path  # its library for Python, which has the registry and the thread pool
    compiler: str = "c++"

    def find(self) -> Path | None:
        """Return the library of these sources: the installed package's, or one that was built.

        Raises:
            LibraryError: the folder is open to others, or the library is not what was built.
        """
        packaged = PACKAGED / self._packaged_name
        if packaged.exists():
            return _same(packaged, "install Cloister again")
        path = self._path
        if not path.exists():
            return None
        _check(self.folder)
        return _same(path, "delete it and run `cloister kernels build` again")

    def build(self) -> Path:
        """Compile the library, unless there is one, and return it.

        Raises:
            LibraryError: no compiler, one that fails, or a folder that is open to others.
        """
        found = self.find()
        if found is not None:
            return found
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(self.folder)
        return self._compile(self._path, f"-Wl,-rpath,{self.bindings.parent}")

    def package(self) -> Path:
        """Compile the library into `folder` as the package of a wheel has it; return it.

        It has its sha256 beside it, and holds no path of this machine.

        Raises:
            LibraryError: no compiler, or one that fails.
        """
        return self._compile(self.folder / self._packaged_name)

    def _compile(self, path: Path, *link: str) -> Path:
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            made = objects(self._compiler(), Path(work), [glue(self.executorch)])
            out = Path(work, path.name)
            _run([self._compiler(), "-shared", "-o", str(out), *map(str, made), str(self.bindings),
                  *link])
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
        """Where the library of these sources lies that this compiler builds."""
        found = shutil.which(self.compiler)
        return self.folder / self._name(_run([found, "--version"]) if found else b"")

    @cached_property
    def _packaged_name(self) -> str:
        return self._name(f"package {ABI} {self.bindings.name}".encode())

    def _name(self, more: bytes) -> str:
        total = hashlib.sha256(f"{self.release} {platform.machine()}".encode() + b"\0" + more)
        for source in sorted(SOURCES.iterdir()):
            total.update(source.name.encode() + b"\0" + source.read_bytes())
        return f"operators-{total.hexdigest()[:16]}.so"


def _check(folder: Path) -> None:
    """Raise LibraryError where others than the user may write to `folder`."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise LibraryError(
            f"Folder {folder.name} of operator libraries can be written to by others; run `chmod "
            "700` on it, or delete it.")


def _same(path: Path, remedy: str) -> Path:
    """Return `path`; raise LibraryError where it is not what was built."""
    try:
        expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        expected = None
    if _sha256(path) != expected:
        raise LibraryError(f"Library {path.name} is not the one that was built; {remedy}.")
    return path


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
