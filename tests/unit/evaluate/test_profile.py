"""`cloister bench --profile` names every operator, and tells no more time than has passed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloister import reference
from cloister.backend import CLOISTER
from cloister.bench import random_checkpoint
from cloister.bench.bare import write_bundle
from cloister.bundle import Bundle
from cloister.cli import main
from cloister.errors import IncompatibleProgram
from cloister.evaluate import profile
from cloister.export import write
from cloister.model.checkpoint import Checkpoint
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.runtime.program import load, runs_here, timed_operators
from cloister.tiers import Scale, Tier, ladder

LAYER = ("linear, normed", "attention", "linear", "linear, normed", "linear, gated")


def test_matrices_are_told_apart_by_their_place() -> None:
    found = profile._kinds(["embedding", *LAYER, *LAYER, "linear, normed"])
    layer = ["qkv", "attention", "o", "gate_up", "down"]
    assert found == ["embedding", *layer, *layer, "head"]


def test_so_are_those_with_norms_after_them_and_in_parts() -> None:
    found = profile._kinds([
        "embedding", *["linear, normed"] * 3, "attention", "linear", "norm", "linear, normed",
        "linear, normed", "linear, gated", "norm", "linear, normed"])
    assert found == ["embedding", "qkv", "qkv", "qkv", "attention", "o", "norm", "gate_up",
                     "gate_up", "down", "norm", "head"]


def test_a_bundle_for_xnnpack_has_no_profile() -> None:
    with pytest.raises(IncompatibleProgram, match="export it with --backend cloister"):
        profile.profiled(Bundle.open(reference.bundle_path("nano-1")))
    assert main(["bench", "--bundle", str(reference.bundle_path("nano-1")), "--profile"]) == 1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile")
    shape = replace(ladder(Scale.REFERENCE)[Tier.NANO_1], context=256)
    random_checkpoint(path / "random", ModelConfig(shape=shape), Recipe.parse("8da4w-g32"))
    source = Checkpoint.open(path / "random")
    write_bundle(source, path / "m.cloister", lambda folder: write.program(
        source, folder, backend=CLOISTER.name), write.DEFAULT_CHUNK)
    return path / "m.cloister"


@pytest.mark.slow
def test_the_times_of_all_operators_are_those_of_the_steps(bundle: Path) -> None:
    found = profile.measure(bundle, steps=4)
    assert set(found["prefill_s"]) == {"128"}  # what the context holds
    assert set(found["decode_s"]) == {"0", "100"}
    for taken in (*found["prefill_s"].values(), *found["decode_s"].values()):
        named = {kind: taken[kind] for kind in profile.KINDS}
        assert set(taken) == {"all", *named}
        assert sum(named.values()) == pytest.approx(taken["all"])
        assert all(time_s > 0 for kind, time_s in named.items() if kind != "norm"), taken
        assert named["norm"] == 0  # this model's norms are fused into its matrix products


@pytest.mark.slow
def test_nothing_is_timed_but_what_was_asked(bundle: Path) -> None:
    import torch

    opened = Bundle.open(bundle)
    layers = opened.manifest.shape.layers
    program = load(bundle / opened.program(runs_here).file, layers)  # with its operators loaded
    tokens = torch.ones(1, 3, dtype=torch.int64)
    program.forward(tokens, 0)
    names = [name for name, _ in timed_operators(lambda: program.forward(tokens, 0))]
    assert names == ["embedding", *LAYER * layers, "linear, normed"]
    assert timed_operators(lambda: None) == []
