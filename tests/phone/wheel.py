"""C++ that is built against the PyPI wheel of ExecuTorch, with CMake."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from cloister import reference
from cloister.bundle import Bundle
from cloister.embed.write import embed

HERE = Path(__file__).parent / "cpp"
# The last commit at which operators read constants in place, which the cache frees.
OLD = "ee96fea1871d01e7667a8aa1707590ceb95997ce"


def missing() -> str:
    """Return what this machine lacks, in words; nothing if it lacks nothing."""
    lacking = [tool for tool in ("cmake", "c++", "make") if shutil.which(tool) is None]
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    return ", ".join([*lacking, *([] if library.suffix != ".a" and library.exists() else
                                  ["a shared library of this Python"])])


def embedded(bundle: Bundle, directory: Path) -> Path:
    """Return a new directory with the glue and the files of `bundle`."""
    embed(bundle, "cpp", directory / "embedded")
    return directory / "embedded"


def build(glue: Path, directory: Path, *options: str) -> Path:
    """Return the directory with `drive` and `stock`, built with `glue`."""
    for command in (("cmake", "-S", HERE, "-B", directory, f"-DGLUE={glue}", *options,
                     "-DCLOISTER_WHEEL=ON", f"-DPython3_EXECUTABLE={sys.executable}"),
                    ("cmake", "--build", directory, "-j2")):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory


def old_bundle(directory: Path) -> Bundle | None:
    """Return Nano-1 as it was before the mend; None where the checkout has no history."""
    family = Path(reference.bundle_path("nano-1")).parent
    done = subprocess.run(
        ["git", "archive", "--format=tar", OLD, "nano-1.cloister"], cwd=family, capture_output=True)
    if done.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return Bundle.open(directory / "nano-1.cloister")
