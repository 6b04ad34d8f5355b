"""The cost of making and running a bundle on this machine."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister import pipeline
from cloister.backend import CLOISTER, XNNPACK
from cloister.bench import process
from cloister.bench.bare import export_apart
from cloister.bench.weights import random_checkpoint
from cloister.bundle import Bundle
from cloister.evaluate.profile import profiled
from cloister.export.check import CheckReport
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.progress import silent
from cloister.runtime.memory import peak_bytes
from cloister.tiers import ladder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloister.progress import Progress
    from cloister.tiers import Scale, Tier

__all__ = ["measure", "profile", "profile_shape", "shape"]


def shape(
    tier: Tier, scale: Scale, recipe: str, progress: Progress = silent, *,
    backend: str = XNNPACK.name, kv: str | None = None, debug: bool = False
) -> dict[str, Any]:
    """Export random weights in the shape of `tier`, then measure the bundle in a new process."""
    with _random(tier, scale, recipe, progress) as (source, out):
        stages: dict[str, float] = {}
        begun = [("open", time.perf_counter())]

        def follow(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
            stages[begun[-1][0]] = time.perf_counter() - begun[-1][1]
            begun.append((stage, time.perf_counter()))
            progress(stage, done, total, note)

        bundle = pipeline.export(source, out, backends=(backend,), kv=kv, progress=follow)
        follow("measure")
        assert isinstance(bundle.report, CheckReport)
        checks = stages.pop("check") + stages.pop("golden")
        return {
            "shape": str(tier), "size": str(scale), "recipe": recipe,
            "parameters": ladder(scale)[tier].parameters,
            "bundle_bytes": bundle.manifest.programs[0].weight_bytes,
            "export_s": sum(stages.values()), "export_stages_s": stages, "check_s": checks,
            "export_peak_bytes": peak_bytes(),
            "mean_kld": bundle.report.divergences.program_from_checkpoint.mean_kld,
            **measure(out, debug=debug),
        }


def measure(bundle: str | Path, *, debug: bool = False) -> dict[str, Any]:
    """Measure the speed of `bundle` in a new process, by `cloister.evaluate.speed`.

    Raises:
        BundleError: see `Bundle.open`.
        WorkerError: the process failed.
    """
    Bundle.open(bundle)
    return process.run("cloister.evaluate.speed", str(bundle), what="measuring", debug=debug)


def profile(bundle: str | Path, *, debug: bool = False) -> dict[str, Any]:
    """Return the time of each operator of `bundle` in a new process, by `evaluate.profile`.

    Raises:
        BundleError: see `Bundle.open`; or no program can be profiled.
        WorkerError: the process failed.
    """
    profiled(Bundle.open(bundle))
    return process.run("cloister.evaluate.profile", str(bundle), what="profiling", debug=debug)


def profile_shape(
    tier: Tier, scale: Scale, recipe: str, progress: Progress = silent, *, kv: str | None = None,
    debug: bool = False
) -> dict[str, Any]:
    """Profile random weights in the shape of `tier`."""
    with _random(tier, scale, recipe, progress) as (source, out):
        progress("export")
        export_apart(CLOISTER.name, source, out, kv=kv, debug=debug)
        progress("profile")
        return {"shape": str(tier), "size": str(scale), "recipe": recipe,
                **profile(out, debug=debug)}


@contextmanager
def _random(
    tier: Tier, scale: Scale, recipe: str, progress: Progress
) -> Iterator[tuple[Path, Path]]:
    """Give a checkpoint of random weights, and a place for its bundle, until the block ends."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "random"
        progress("random weights")
        random_checkpoint(source, ModelConfig(shape=ladder(scale)[tier]), Recipe.parse(recipe))
        yield source, Path(scratch) / f"{tier}.cloister"
