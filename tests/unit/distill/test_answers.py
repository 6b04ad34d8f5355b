"""A teacher answers requests that nobody answered, and makes up its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.corpus import Example, read
from cloister.distill import answers
from cloister.distill.answers import answered, kept_samples, samples, user_begins
from cloister.distill.examples import SELF, encode
from cloister.distill.run import DistillReport, DistillSettings, distill
from cloister.distill.schedule import Schedule
from cloister.distill.teacher import FileStore
from cloister.errors import DataError, SettingError, TokenizerError
from cloister.message import Message
from cloister.model.checkpoint import Checkpoint
from cloister.reference import checkpoint_path
from cloister.tiers import Tier
from cloister.tokenizer import Tokenizer

REQUESTS = [
    Example(task="call", input=text, target="zebra", place=f"mine:{number}")
    for number, text in enumerate(("will it rain in Boston tomorrow", "play some jazz"), start=1)]


@pytest.fixture(scope="module")
def teacher() -> Checkpoint:
    return Checkpoint.open(checkpoint_path("nano-1"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same, whose template brings a system message along, as those of chat models do."""
    path = tmp_path_factory.mktemp("chatty") / "nano-1"
    shutil.copytree(checkpoint_path("nano-1"), path)
    template = path / "chat_template.jinja"
    template.write_text(
        "{% if messages[0].role != 'system' %}<|system|>call<|end|>{% endif %}"
        + template.read_text("utf-8"), "utf-8")
    return Checkpoint.open(path)


def test_each_request_is_answered_in_its_order_and_its_target_is_not_read(
    teacher: Checkpoint
) -> None:
    found = answered(teacher, REQUESTS)
    assert [json.loads(each.target)["name"] for each in found] == ["GetWeather", "PlayMusic"]
    assert [(each.task, each.input, each.place) for each in found] == [
        (each.task, each.input, each.place) for each in REQUESTS]


def test_an_answer_without_an_end_teaches_nothing(teacher: Checkpoint) -> None:
    assert answered(teacher, REQUESTS, limit=2) == []


def test_sampled_answers_are_those_of_their_seed(teacher: Checkpoint) -> None:
    one, same, other = (
        answered(teacher, REQUESTS * 4, temperature=2.0, seed=seed, limit=64) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_teacher_makes_up_what_it_is_asked_and_answers_it(chatty: Checkpoint) -> None:
    found = samples(chatty, 24, seed=3)
    assert len(found) > 1
    assert len({each.input for each in found}) == len(found)
    assert all(each.input.strip() and each.target.strip() for each in found)
    assert all(each.messages == (Message(role="user", content=each.input),) for each in found)
    assert found == samples(chatty, 24, seed=3)


def test_a_run_that_goes_on_learns_from_the_samples_that_it_kept(
    chatty: Checkpoint, tmp_path: Path
) -> None:
    made = kept_samples(chatty, 16, tmp_path, seed=0)
    kept, = tmp_path.iterdir()
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:-1]))
    assert kept_samples(chatty, 16, tmp_path, seed=0) == made[:-1]
    assert kept_samples(chatty, 16, tmp_path, seed=1) != made


def test_where_the_user_speaks_is_what_the_template_says(chatty: Checkpoint) -> None:
    tokenizer = Tokenizer.from_files(
        chatty.tokenizer_path, chatty.template_path, chatty.metadata)
    system, end, user = map(tokenizer.id_of, ("<|system|>", "<|end|>", "<|user|>"))
    assert user_begins(tokenizer) == [system, *tokenizer.encode("call"), end, user]


def test_a_model_without_a_template_makes_up_no_conversations(
    chatty: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(chatty.path, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="has no chat template"):
        samples(Checkpoint.open(tmp_path / "base"), 4)


def test_a_teacher_that_ends_nothing_is_refused(
    chatty: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_ANSWER", 1)
    with pytest.raises(DataError, match="it ended none"):
        samples(chatty, 4)


def test_a_student_learns_from_what_its_teacher_says_without_any_data(
    chatty: Checkpoint, tmp_path: Path
) -> None:
    settings = DistillSettings(
        samples=24, schedule=Schedule(steps=2, tokens=256, micro=256, warmup=0))
    student = distill(
        chatty, tmp_path / "s", student=chatty.metadata.config.shape, data=SELF,
        held_out=REQUESTS, settings=settings)
    kept, = (tmp_path / "s.run").glob("samples-*.jsonl")
    assert read(kept)
    assert isinstance(student.report, DistillReport)
    assert len(student.report.run.losses) == 2


def test_what_a_teacher_says_at_too_great_a_length_is_left_out_whatever_its_share(
    chatty: Checkpoint, tmp_path: Path
) -> None:
    lengths = [len(prompt) + len(answer) for prompt, answer in encode(
        chatty, samples(chatty, 24, seed=0)).pairs]
    shape = replace(chatty.metadata.config.shape, context=max(lengths) - 1)
    settings = DistillSettings(
        samples=24, schedule=Schedule(steps=1, tokens=256, micro=256, warmup=0), tolerate=0.0)
    short = REQUESTS[:1]
    distill(chatty, tmp_path / "s", student=shape, data=SELF, held_out=short, settings=settings)


def test_what_is_kept_open_is_not_called_sealed(chatty: Checkpoint, tmp_path: Path) -> None:
    def store(_: object) -> FileStore:
        raise AssertionError

    with pytest.raises(SettingError, match="plain text"):
        distill(chatty, tmp_path / "s", student=Tier.NANO_1, data=SELF,
                settings=DistillSettings(draws=4, store=store))
    assert not list(tmp_path.iterdir())
