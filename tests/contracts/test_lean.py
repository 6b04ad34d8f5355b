"""What is imported is what is needed, and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cloister
from cloister import reference

HEAVY = ("torch", "torchao", "executorch", "transformers", "safetensors", "numpy", "rich")


def modules_after(code: str) -> set[str]:
    """Names in `sys.modules` of a new process that ran `code`."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"],
        env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, check=True,
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", [
    "cloister", "cloister.cli", "cloister.tiers", "cloister.settings", "cloister.manifest",
    "cloister.bundle", "cloister.corpus", "cloister.media", "cloister.runtime.client",
    "cloister.vault.store",
])
def test_nothing_heavy_comes_with(name: str) -> None:
    assert not modules_after(f"import {name}") & set(HEAVY)


def test_the_tokenizer_needs_no_torch() -> None:
    assert "torch" not in modules_after("import cloister.tokenizer")


@pytest.mark.slow
def test_an_engine_runs_without_training_or_export_code(tmp_path: Path) -> None:
    path = reference.bundle_path("nano-1")
    modules = modules_after(
        f"import os; os.environ['CLOISTER_HOME'] = {str(tmp_path)!r}\n"
        "from cloister import Engine, Session\n"
        f"print(len(list(Session(Engine({str(path)!r})).stream('hello', max_tokens=3))))"
    )
    assert "torch" in modules
    unwanted = ("torchao", "transformers", "cloister.model", "cloister.export",
                "cloister_kernels.ops", "cloister_kernels.pack", "cloister_kernels.reference",
                "executorch.exir", "executorch.runtime")
    assert not [name for name in modules if name.startswith(unwanted)]


@pytest.mark.slow
def test_training_runs_where_no_exporter_is_installed() -> None:
    modules = modules_after(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torchao', 'executorch', 'transformers', 'lm_eval'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import cloister.distill.run\n"
        "print()"
    )
    assert "cloister.distill.loop" in modules


def test_the_public_names_are_these_and_each_can_be_had() -> None:
    assert cloister.__all__ == sorted(cloister.__all__)
    assert dir(cloister) == cloister.__all__
    for name in cloister.__all__:
        assert getattr(cloister, name).__doc__
    with pytest.raises(AttributeError):
        cloister.surprise  # noqa: B018
