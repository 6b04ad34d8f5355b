"""A student sees and hears with what its teacher does, where that fits it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.model import test_sense as tiny

from cloister.corpus import Example
from cloister.distill.run import DistillReport, DistillSettings, distill
from cloister.distill.schedule import Schedule
from cloister.model.checkpoint import Checkpoint
from cloister.model.sense_file import SenseKind

EXAMPLES = [Example(task="", input=f"what is {n}", target="the fox", place=f"a:{n}")
            for n in range(8)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Checkpoint:
    shape = replace(tiny.SHAPE, layers=2)
    return tiny.checkpoint(tmp_path_factory.mktemp("teacher") / "t", tokenizer_dir, shape=shape)


def taught(teacher: Checkpoint, out: Path, *, from_scratch: bool = False, **shape: int
           ) -> Checkpoint:
    schedule = Schedule(steps=1, tokens=128, micro=128, warmup=0)
    return distill(
        teacher, out, student=replace(teacher.metadata.config.shape, **shape), data=EXAMPLES[:6],
        held_out=EXAMPLES[6:], settings=DistillSettings(
            schedule=schedule, from_scratch=from_scratch))


def test_a_student_of_its_width_keeps_what_reads_media(teacher: Checkpoint, tmp_path: Path) -> None:
    student = taught(teacher, tmp_path / "s", layers=1)
    assert student.metadata.media == teacher.metadata.media == tiny.MEDIA
    for kind in SenseKind:
        assert student.senses[kind].identity == teacher.senses[kind].identity
    assert isinstance(student.report, DistillReport) and student.report.left_out == ()


@pytest.mark.parametrize("change", [{"hidden_size": 12}, {"from_scratch": True}])
def test_another_student_says_what_it_was_left_without(
    teacher: Checkpoint, tmp_path: Path, change: dict[str, int]
) -> None:
    student = taught(teacher, tmp_path / "s", **change)
    assert student.metadata.media is None and not student.senses
    assert isinstance(student.report, DistillReport)
    assert set(student.report.left_out) == {"vision", "audio"}
