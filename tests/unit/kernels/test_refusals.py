"""`refusals.cc`: arguments of the operators that do not fit are refused, under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import executorch
import pytest
import torch
from executorch.extension.pybindings import _portable_lib

from cloister_kernels.library import glue, objects

SOURCE = Path(__file__).with_name("refusals.cc")
EXECUTORCH = Path(next(iter(executorch.__path__)))
# The wheel's classes are declared, not defined; its dispatch tables are not of this compiler.
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=vptr",
             "-fno-sanitize-recover=undefined")


def build(folder: Path) -> Path:
    """Return the trial, linked to the bindings of ExecuTorch's wheel."""
    made = objects(
        "c++", folder, [glue(EXECUTORCH), glue(EXECUTORCH, str(SOURCE))], SANITIZED)
    more = EXECUTORCH / "kernels" / "quantized" / "libquantized_ops_aot_lib.so"  # what those lack
    places = (Path(torch.__file__).parent / "lib", sysconfig.get_config_var("LIBDIR"), more.parent,
              Path(_portable_lib.__file__).parent)
    python = Path(places[1], sysconfig.get_config_var("INSTSONAME"))
    if not python.exists() or python.suffix == ".a":
        pytest.skip("no shared library of this Python")
    path = folder / "refusals"
    subprocess.run(
        ["c++", *SANITIZED, "-o", path, *made, "-Wl,--no-as-needed", _portable_lib.__file__, python,
         more, *(f"-Wl,-rpath,{place}" for place in places), "-Wl,--allow-shlib-undefined"],
        check=True)
    return path


@pytest.mark.slow
def test_arguments_that_do_not_fit_are_refused_and_nothing_beyond_them_is_read(
    tmp_path: Path
) -> None:
    done = subprocess.run(
        [build(tmp_path), "1", "3000"], capture_output=True, text=True, check=False,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert done.returncode == 0, done.stdout + "\n".join(lines[-40:])
    counts = re.findall(r"(\w+)\.out: (\d+) answered, (\d+) refused", done.stdout)
    assert [name for name, *_ in counts] == ["linear", "attention", "embedding", "norm"]
    for _, answered, refused in counts:
        assert int(answered) > 750 and int(refused) > 750
