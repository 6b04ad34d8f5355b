"""An engine is loaded only where it fits, and its KV state goes on elsewhere to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from tests.conftest import SHAPE, make_bundle
from tests.unit.runtime.conftest import FakeEngine

from cloister.bundle import Bundle
from cloister.errors import NotEnoughMemory, SettingError, SnapshotError, VocabularyMismatch
from cloister.runtime import memory
from cloister.runtime.core import MediaPosition, Rows
from cloister.runtime.engine import Engine
from cloister.runtime.generate import score


def test_a_snapshot_continues_in_another_engine_to_the_bit(bundle: Bundle) -> None:
    ids = [7, 8, 9, 10]
    one = FakeEngine(bundle.path)
    one.extend(ids[:3])
    snapshot, wanted = one.snapshot(), one.extend(ids)
    two = FakeEngine(bundle.path)
    two.restore(snapshot)
    assert torch.equal(two.extend(ids), wanted)
    assert two.program.calls == [(3, 1)]  # nothing was read again


def test_a_snapshot_of_another_model_or_a_damaged_one_is_refused(
    engine: FakeEngine, tmp_path: Path, tokenizer_dir: Path
) -> None:
    engine.extend([1, 2, 3])
    snapshot = engine.snapshot()
    other = FakeEngine(make_bundle(tmp_path / "other.cloister", tokenizer_dir, recipe="8da8w").path)
    with pytest.raises(SnapshotError):
        other.restore(snapshot)
    tensors = load(snapshot)
    rows = torch.zeros(1, 64, 1, 1)
    forged = (
        {**tensors, "ids": torch.tensor([[1, 2, 3]])},
        {"layers.0.attn.k_cache": rows, "ids": torch.zeros(70, dtype=torch.int64)},  # context: 64
        {**tensors, "ids": torch.tensor([1.0, 2.0, 3.0])},
        {"ids": torch.tensor([1, 2, 3])},
        {**tensors, "layers.0.attn.k_cache": rows},
    )
    damages = [save(each, {"model_id": engine.model_id}) for each in forged]
    for damaged in (b"", snapshot[:-8], b"x" * 100, snapshot[:200], save(tensors), *damages):
        with pytest.raises(SnapshotError):
            engine.restore(damaged)
    assert engine.cached == [1, 2, 3]


def test_a_snapshot_of_a_picture_is_refused(engine: FakeEngine) -> None:
    engine.mark_cached([1, MediaPosition(bytes(32), 0)])
    with pytest.raises(SnapshotError, match="picture"):
        engine.snapshot()


def enough(bundle: Bundle) -> int:
    return bundle.manifest.programs[0].required_bytes(bundle.manifest.shape)


def test_too_little_memory_is_refused_with_both_numbers(bundle: Bundle) -> None:
    with pytest.raises(NotEnoughMemory, match=r"GB and 0\.07 GB"):
        FakeEngine(bundle.path, available_bytes=enough(bundle) - 1)
    FakeEngine(bundle.path, available_bytes=enough(bundle))


def test_memory_for_scoring_is_asked_for_once(bundle: Bundle) -> None:
    engine = FakeEngine(bundle.path, available_bytes=enough(bundle))
    list(score(engine, [1, 2, 3], 0))
    engine._available = 10  # as after the second method took its share
    assert sum(len(rows) for rows in score(engine, [1, 2, 3], 0)) == 3


def test_scoring_is_refused_where_a_second_copy_does_not_fit(bundle: Bundle) -> None:
    engine = FakeEngine(bundle.path, available_bytes=enough(bundle))
    engine._available = 10
    with pytest.raises(NotEnoughMemory):
        engine.extend([1, 2, 3], Rows.ALL)
    assert engine.cached == []
    engine.extend([1, 2, 3])


@pytest.mark.parametrize("threads", [0, -1, 2**40])
def test_an_impossible_number_of_threads_is_refused(bundle: Bundle, threads: int) -> None:
    with pytest.raises(SettingError, match="from 1 to 1024"):
        Engine(bundle.path, threads=threads)


def test_what_is_available_is_at_most_what_the_machine_has() -> None:
    import psutil

    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    bundle = make_bundle(
        tmp_path / "small.cloister", tokenizer_dir, shape=replace(SHAPE, vocab_size=200))
    with pytest.raises(VocabularyMismatch, match=r"300.*200"):
        FakeEngine(bundle.path)
