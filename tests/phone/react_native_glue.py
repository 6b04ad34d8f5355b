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

from tests.phone import npm
from tests.phone.golden import spoken

from cloister import reference
from cloister.bundle import Bundle
from cloister.embed.facts import Check, facts_of
from cloister.embed.write import embed

CASES = Path(__file__).parent / "react_native"
RELEASE = "0.10.2"


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
    """Return the golden answers as texts, without the end's."""
    ends = facts_of(bundle).ends

    def told(answer: str) -> str:
        return next((answer.removesuffix(end) for end in ends if answer.endswith(end)), answer)

    return [Check(prompt=row.prompt, answer=told(row.answer), tokens=row.tokens)
            for row in spoken(bundle)]


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
