"""Processes that train together hold a part of everything, and make one student."""

from pathlib import Path

import pytest
import torch
from tests.bench.parallel import make_teacher, measure

from cloister.distill.parallel import Parallel, Sharded
from cloister.model.checkpoint import Checkpoint

pytestmark = pytest.mark.slow


def test_a_process_of_four_takes_a_part_of_the_memory_of_one(tmp_path: Path) -> None:
    """On a model so small that what does not shrink counts; the bench has a larger one."""
    teacher = make_teacher(tmp_path / "teacher", 256, 20)
    one, four = (
        measure(world, teacher.path, tmp_path / f"of-{world}", steps=2) for world in (1, 4))
    assert four["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert four["peak_bytes"] < 0.6 * one["peak_bytes"]
    assert one["identity"] != teacher.identity


def test_a_model_read_layer_by_layer_is_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_teacher(tmp_path / "teacher", 64, 2)
    model, plain = Sharded.load(checkpoint, Parallel()), checkpoint.load()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(lambda: model.decoder(tokens)), plain(tokens))
    assert model.decoder.head.weight is model.decoder.embed.weight
    assert model.identity == Checkpoint.open(checkpoint.path).identity
    narrow = Sharded.load(checkpoint, Parallel(), dtype=torch.bfloat16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}
    assert narrow.decoder.cos.dtype is torch.float32
