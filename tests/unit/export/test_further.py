"""Programs for backends that are not here: their graphs are proved, and nothing claims more."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.export.test_lower import LAYOUTS, quantized_decoder, relative_error

from cloister import pipeline
from cloister.backend import FURTHER, NEVER_RUN
from cloister.bench import random_checkpoint
from cloister.bundle import Bundle
from cloister.errors import (
    BundleCorrupt,
    ExportError,
    ExportMismatch,
    IncompatibleProgram,
    SettingError,
)
from cloister.export import _executorch, further
from cloister.export.backends import partitioned
from cloister.model.cache import KVCache
from cloister.model.checkpoint import Metadata
from cloister.model.config import ModelConfig
from cloister.model.recipe import Recipe
from cloister.runtime.engine import Engine
from cloister.settings import Settings
from cloister.tiers import Scale, Tier, ladder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer, of random weights."""
    path = tmp_path_factory.mktemp("random") / "one"
    shape = replace(ladder(Scale.REFERENCE)[Tier.NANO_1], layers=1, context=128)
    random_checkpoint(path, ModelConfig(shape=shape), Recipe.parse("8da4w-g32"))
    return path


@pytest.fixture(scope="module")
def both(source: Path) -> tuple[Bundle, Bundle]:
    """Its bundle without further programs, and with all."""
    plain = pipeline.export(source, source.with_name("plain.cloister"))
    return plain, pipeline.export(
        source, source.with_name("all.cloister"), backends=("xnnpack", *FURTHER))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_graph_agrees_with_the_decoder_past_a_window(layout: str) -> None:
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = quantized_decoder(LAYOUTS[layout], "8da4w-g32")
    with torch.no_grad():
        expected = decoder(torch.tensor([ids]), KVCache(decoder.config))[0]
    traced = partitioned.trace(decoder, 16)
    got = partitioned.score(traced, ids)
    # Activations are not rounded to 8 bits here: parts in a hundred. A wrong mask or rotation
    # moves the logits by tens of per cent.
    assert relative_error(got, expected) < 0.05
    whole = traced.module()(torch.tensor([ids[:16]]), torch.tensor([0]))
    assert relative_error(whole, got[15:16]) < 1e-4


@pytest.mark.parametrize("backend", FURTHER)
def test_every_matrix_is_computed_in_a_delegate_and_the_log_stays_as_it_was(backend: str) -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.root.manager.disable
    decoder = quantized_decoder(LAYOUTS["gemma-2"], "8da4w-g32-e4")
    manager = partitioned.lower(
        partitioned.trace(decoder, partitioned.chunk_of(backend, 16)), backend, {})
    delegates, outside = partitioned.outside(manager)
    assert delegates >= 1
    assert not {name for name in outside if "mm" in name or "linear" in name}, outside
    if backend == "coreml":
        assert (delegates, outside) == (1, {})
    assert (root.level, root.handlers, logging.root.manager.disable) == before


def test_the_program_that_runs_here_stays_as_it_is_to_the_byte(
    both: tuple[Bundle, Bundle]
) -> None:
    plain, everything = both
    entry = plain.manifest.programs[0]
    assert everything.manifest.programs[0] == entry
    assert everything.manifest.files[entry.file] == plain.manifest.files[entry.file]
    assert everything.model_id(entry) == plain.model_id(entry)
    assert set(plain.manifest.files) == set(everything.manifest.files) - {
        f"program.{name}.pte" for name in FURTHER}
    assert plain.receipt()["further_programs"] == []


def test_manifest_receipt_and_display_say_that_it_was_never_run(
    both: tuple[Bundle, Bundle]
) -> None:
    bundle = both[1]
    _, *entries = bundle.manifest.programs
    assert [entry.note for entry in entries] == [NEVER_RUN] * len(FURTHER)
    said = bundle.receipt()["further_programs"]
    assert [(each["backend"], each["note"]) for each in said] == [
        (name, NEVER_RUN) for name in FURTHER]
    assert all(each["graph_against_checkpoint"]["mean_kld"] < 0.01 for each in said)
    for name in FURTHER:
        assert dict(bundle.summary())[f"program for {name}"].endswith(NEVER_RUN)
    xnnpack, *others = (bundle.manifest.files[each.file].size for each in bundle.manifest.programs)
    assert max(others) < 1.2 * xnnpack  # four bits a weight there, too


def test_the_engine_passes_over_them_and_verify_claims_their_hashes_only(
    both: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    path = tmp_path / "copy.cloister"
    shutil.copytree(both[1].path, path)
    settings = Settings.from_environment()
    assert Engine(path, settings=settings).backend == "xnnpack"
    assert pipeline.verify(path, settings)["checks"]["programs"] == {
        "xnnpack": "golden prompts", **dict.fromkeys(FURTHER, f"sha256 only; {NEVER_RUN}")}
    with pytest.raises(IncompatibleProgram, match=f"coreml \\({NEVER_RUN}\\)"):
        Bundle.open(path).program(lambda entry: entry.backend == "elsewhere")
    with (path / "program.vulkan.pte").open("r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    with pytest.raises(BundleCorrupt, match=r"program\.vulkan\.pte"):
        pipeline.verify(path, settings)


def test_a_graph_that_is_not_the_checkpoint_s_is_refused_and_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _executorch, "dequantize", lambda q, *_, **__: q.float() / 50)
    with pytest.raises(ExportMismatch, match="The graph for vulkan"):
        pipeline.export(source, tmp_path / "x.cloister", backends=("xnnpack", "vulkan"))
    assert list(tmp_path.iterdir()) == []


def test_without_its_exporter_core_ml_is_refused_by_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ExportError, match="pip install coremltools"):
        pipeline.export(source, tmp_path / "x.cloister", backends=("xnnpack", "coreml"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "names"), [
    ("xnnpack", ("qnn",)), ("xnnpack", ("coreml", "coreml")), ("xnnpack", ("xnnpack",)),
    ("cloister", ("xnnpack", "xnnpack")), ("cloister", ("cloister",))])
def test_a_backend_that_is_none_is_refused(first: str, names: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match="choose of coreml, vulkan"):
        further.check_names(Metadata(name="tiny", config=LAYOUTS["llama"]), first, names)
