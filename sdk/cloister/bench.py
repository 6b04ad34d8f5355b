"""Benchmarks: the cost of making and running a bundle on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cloister import pipeline, reference
from cloister.backend import XNNPACK
from cloister.bundle import Bundle
from cloister.errors import WorkerError
from cloister.export.check import CheckReport
from cloister.model.checkpoint import Metadata, plan
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.model.writer import CheckpointWriter
from cloister.progress import silent
from cloister.runtime.memory import peak_bytes
from cloister.tiers import ladder

if TYPE_CHECKING:
    from cloister.progress import Progress
    from cloister.tiers import Scale, Tier

__all__ = ["measure", "random_checkpoint", "shape"]


def shape(
    tier: Tier, scale: Scale, recipe: str, progress: Progress = silent, *,
    backend: str = XNNPACK.name, kv: str | None = None, debug: bool = False
) -> dict[str, Any]:
    """Export random weights in the shape of `tier`, then measure the bundle in a new process."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "random", Path(scratch) / f"{tier}.cloister"
        progress("random weights")
        random_checkpoint(source, ModelConfig(shape=ladder(scale)[tier]), Recipe.parse(recipe))
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
    done = subprocess.run(
        [sys.executable, "-m", "cloister.evaluate.speed", str(bundle)],
        stdout=subprocess.PIPE, stderr=None if debug else subprocess.DEVNULL, check=False,
    )
    if done.returncode:
        raise WorkerError(
            f"The measuring process ended with exit status {done.returncode}; run it again with "
            "--debug to see why."
        )
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def random_checkpoint(path: Path, config: ModelConfig, recipe: Recipe) -> None:
    """Write a quantized checkpoint of random weights, each matrix of about unit gain."""
    config = replace(config, shape=replace(config.shape, tied=False))
    rng = torch.Generator().manual_seed(0)
    tensors = plan(config, recipe)
    tokenizer = reference.bundle_path("nano-1")
    with CheckpointWriter(
        path, metadata=Metadata(name="random", config=config, recipe=recipe.name, eos=(0,)),
        tensors=tensors, tokenizer=tokenizer / "tokenizer.json",
        template=tokenizer / "chat_template.jinja",
    ) as writer:
        for name, (dtype, size) in tensors.items():
            if dtype is torch.int8:
                scheme = recipe.scheme_of(name.removesuffix(".q"))
                assert scheme is not None
                half = 2 ** (scheme.bits - 1)
                inputs = size[1]
                # Uniform integers have a deviation of half / sqrt(3).
                gain = 3**0.5 / half / inputs**0.5
                writer.add(name, torch.randint(-half, half, size, dtype=torch.int8, generator=rng))
            elif name.endswith(".scale"):
                writer.add(name, torch.full(size, gain))
            elif name.endswith("norm.weight"):
                writer.add(name, torch.ones(size))
            else:
                writer.add(name, torch.zeros(size))
