"""The glue of React Native, type-checked, and run by Node with the stock runner behind it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
from tests.phone import npm

from cloister import reference
from cloister.bundle import Bundle
from cloister.embed.facts import Check
from cloister.embed.write import embed

CASES = Path(__file__).parent / "react_native"
RELEASE = "0.10.2"
OLD = "ee96fea1871d01e7667a8aa1707590ceb95997ce"


def missing() -> str | None:
    """Return what this machine lacks, or None."""
    if not shutil.which("node"):
        return "this machine has no Node"
    found = npm.modules()
    return found if isinstance(found, str) else None


def written(out: Path, bundle: Bundle | None = None) -> Path:
    """Write what an app pastes for `bundle`, Nano-1 if none, beside the packages of npm."""
    embed(bundle or Bundle.open(reference.bundle_path("nano-1")), "react-native", out)
    (out / "node_modules").symlink_to(npm.modules())
    return out


def type_errors(app: Path) -> str:
    """Return what the TypeScript compiler says of the glue; nothing where its types are right."""
    done = subprocess.run(
        [app / "node_modules/.bin/tsc", "-p", ".", "--noEmit"], cwd=app, capture_output=True,
        text=True, timeout=300)
    return done.stdout + done.stderr


def old_export(folder: Path) -> Bundle | None:
    """Return Nano-1 as it was when the weights cache freed constants in use; None without history.

    It is written into `folder`.
    """
    packed = subprocess.run(
        ["git", "archive", OLD, "sdk/cloister/reference/family/nano-1.cloister"],
        cwd=CASES.parents[2], capture_output=True)
    if packed.returncode:
        return None
    subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
    return Bundle.open(folder / "sdk/cloister/reference/family/nano-1.cloister")


def built(app: Path, out: Path) -> None:
    """Write the glue as an app is built: by React Native's Babel preset and worklets' plugin."""
    out.mkdir()
    subprocess.run(["node", CASES / "build.cjs", app, out], check=True, timeout=120)


def bytecode(out: Path) -> list[str]:
    """Compile what `built` wrote by Hermes's compiler; return what it could not."""
    compiler = npm.modules() / "hermes-compiler/hermesc/linux64-bin/hermesc"  # type: ignore[operator]
    return [source.name for source in sorted(out.glob("*.js")) if subprocess.run(
        [compiler, "-emit-binary", "-out", source.with_suffix(".hbc"), source],
        capture_output=True, timeout=60).returncode]


def golden(bundle: Bundle) -> list[Check]:
    """Return the golden answers as texts, without the end's, whose prompts give their ids back."""
    plain = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
    found = []
    for row in bundle.golden():
        ended = row.tokens[-1] in bundle.manifest.eos
        prompt, answer = (plain.decode(list(ids), skip_special_tokens=False) for ids in (
            row.prompt, row.tokens[:-1] if ended else row.tokens))
        if tuple(plain.encode(prompt, add_special_tokens=False).ids) == row.prompt:
            found.append(Check(prompt=prompt, answer=answer, tokens=len(row.tokens)))
    return found


def results(app: Path, golden: Sequence[Check] = (), version: str = RELEASE) -> dict[str, Any]:
    """Run every case of cases.cjs with the glue in `app`, and return what came of each."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        built(app, work / "built")
        (work / "model").symlink_to(app / "model")
        (work / "golden.json").write_text(json.dumps([asdict(row) for row in golden]))
        (work / "node_modules").symlink_to(app / "node_modules")
        done = subprocess.run(
            ["node", CASES / "cases.cjs", work, sys.executable, version], capture_output=True,
            text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})
        if done.returncode:
            log = (work / "log").read_text(errors="replace") if (work / "log").exists() else ""
            raise ChildProcessError(done.stderr + log[-2000:])
        found: dict[str, Any] = json.loads((work / "results.json").read_text())
        return found
