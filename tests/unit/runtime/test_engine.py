"""An engine is loaded only where it fits, and its KV state goes on elsewhere to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tests.conftest import SHAPE, make_bundle
from tests.unit.runtime.conftest import FakeEngine

from cloister.bundle import Bundle
from cloister.errors import (
    BundleError,
    NotEnoughMemory,
    SettingError,
    SnapshotError,
    VocabularyMismatch,
)
from cloister.runtime import memory
from cloister.runtime.chat import Sampling, Token
from cloister.runtime.core import MediaPosition, Rows
from cloister.runtime.engine import Engine
from cloister.runtime.generate import score
from cloister.runtime.session import Session


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


def test_memory_for_a_second_copy_is_asked_for_at_once_where_tokens_are_guessed(
    bundle: Bundle
) -> None:
    twice = bundle.manifest.programs[0].required_bytes(bundle.manifest.shape, methods=2)
    assert twice > enough(bundle)
    with pytest.raises(NotEnoughMemory):
        FakeEngine(bundle.path, draft="lookup", available_bytes=twice - 1)
    FakeEngine(bundle.path, draft="lookup", available_bytes=twice)


def test_what_guesses_is_told(bundle: Bundle, tmp_path: Path, tokenizer_dir: Path) -> None:
    lower = make_bundle(tmp_path / "lower.cloister", tokenizer_dir)
    assert FakeEngine(bundle.path).drafts_by == "off"
    assert FakeEngine(bundle.path).drafter() is None
    assert FakeEngine(bundle.path, draft="lookup").drafts_by == "lookup"
    engine = FakeEngine(bundle.path, draft=lower.path)
    assert engine.drafts_by == lower.path.name
    assert ("drafts by", lower.path.name) in list(engine.summary())
    with pytest.raises(BundleError):
        FakeEngine(bundle.path, draft="nowhere.cloister")


def test_a_lower_tier_with_another_tokenizer_is_refused_by_name(
    bundle: Bundle, tmp_path: Path, tokenizer_dir: Path
) -> None:
    changed = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer") / "tokenizer.json"
    definition = json.loads(changed.read_text("utf-8"))
    definition["normalizer"] = {"type": "Lowercase"}
    changed.write_text(json.dumps(definition), "utf-8")
    other = make_bundle(tmp_path / "other.cloister", changed.parent)
    with pytest.raises(VocabularyMismatch, match=r"other\.cloister has another tokenizer"):
        FakeEngine(bundle.path, draft=other.path)


@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("lower", [False, True])
def test_answers_are_those_without_guesses(
    long_bundle: Bundle, sampling: Sampling, lower: bool
) -> None:
    def said(**options: Any) -> list[Token]:
        session = Session(FakeEngine(long_bundle.path, (70, 71, 72), **options), system="Be brief.")
        first = list(session.stream("the fox", max_tokens=90, sampling=sampling, top=2))
        found = [*first, *session.stream("and again", max_tokens=90, sampling=sampling, top=2)]
        guessed.append((session.stats.drafted_tokens, session.stats.accepted_tokens))
        return found

    guessed = list[tuple[int, int]]()
    assert said(draft=long_bundle.path if lower else "lookup") == said()
    drafted, accepted = guessed[0]
    assert 0 < accepted <= drafted  # both models go round in three letters
    assert guessed[1] == (0, 0)


def test_what_is_available_is_at_most_what_the_machine_has() -> None:
    import psutil

    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    bundle = make_bundle(
        tmp_path / "small.cloister", tokenizer_dir, shape=replace(SHAPE, vocab_size=200))
    with pytest.raises(VocabularyMismatch, match=r"300.*200"):
        FakeEngine(bundle.path)
