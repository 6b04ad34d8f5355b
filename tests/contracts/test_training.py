"""A student is made, quantized, gated and measured; bad input costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister import reference
from cloister.bundle import Bundle
from cloister.cli import main
from cloister.commands import teach
from cloister.corpus import read, split
from cloister.distill import loop
from cloister.model.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

TEACHER = reference.checkpoint_path("pro")
NANO = reference.checkpoint_path("nano-1")
SECRET = "zebra"
QUICK = ("--steps", "3", "--tokens", "512", "--micro", "256")


def lines(path: Path, count: int = 120, first: int = 0) -> Path:
    """Requests and calls as JSON lines."""
    rows = [
        {"task": "call", "input": f"play {SECRET} number {i}", "target": json.dumps(
            {"name": "PlayMusic", "arguments": {"track": f"{SECRET} number {i}"}})}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lines(tmp_path_factory.mktemp("data") / "own.jsonl")


def done(capfd: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The record of a command that succeeds."""
    code = main([*map(str, arguments), "--json"])
    out, said = capfd.readouterr()
    assert code == 0, said
    assert SECRET not in said
    return json.loads(out)


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence of a command that is refused."""
    assert main(list(map(str, arguments))) == 1
    said = capfd.readouterr().err
    assert SECRET not in said
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_student_is_distilled_quantized_with_training_exported_and_measured(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student, four_bit, bundle = (tmp_path / name for name in ("s", "q", "n.cloister"))
    found = done(capfd, "distill", "--teacher", TEACHER, "--tier", "nano-1", "--data", data,
                 "-o", student, *QUICK)
    checkpoint = Checkpoint.open(student)
    assert found["identity"] == checkpoint.identity
    assert checkpoint.metadata.parent == Checkpoint.open(TEACHER).identity
    held_out = found["held_out_cross_entropy"]
    assert held_out["after"] < held_out["before"]
    apart = tmp_path / "s.run" / "held-out.jsonl"
    assert 1 <= len(read(apart)) < 20
    assert set(read(apart)) < set(read(data))
    assert "s exists already" in refused(
        capfd, "distill", "--teacher", TEACHER, "--tier", "nano-1", "--data", data, "-o", student)
    steps = (tmp_path / "s.run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [0, 1, 2]
    assert SECRET not in "".join(steps)
    scratch = ("distill", "--from-scratch", "--teacher", TEACHER, "--tier", "nano-1", "--data",
               data, *QUICK, "-o")
    assert "other settings" in refused(capfd, *scratch, student, "--force")
    noise = done(capfd, *scratch, tmp_path / "noise")["held_out_cross_entropy"]
    assert noise["teacher"] == held_out["teacher"]
    assert noise["before"] > 7.5  # as good as a guess among 4,096

    found = done(capfd, "quantize", student, "--qat", "--data", data, "-o", four_bit, *QUICK)
    assert found["identity"] == Checkpoint.open(four_bit).identity
    assert Checkpoint.open(four_bit).metadata.parent == checkpoint.identity
    assert Checkpoint.open(four_bit).metadata.recipe == "8da4w-g32"

    done(capfd, "export", four_bit, "-o", bundle, "--gate", "mean_kld<=0.5",
         "--gate-data", data, "--gate-against", student)
    before = Bundle.open(bundle)
    measured = done(capfd, "eval", bundle, "--data", data, "--limit", "20",
                    "--against", student, "--record")
    assert measured["n"] == 20
    assert {"frame_exact", "intent_accuracy", "slot_f1", "mean_kld", "top1", "ppl_ratio",
            "flips"} <= set(measured["metrics"])
    after = Bundle.open(bundle)
    after.verify()
    (kept,) = after.receipt()["evaluations"].values()
    assert kept["metrics"] == measured["metrics"]
    ids = [each.model_id(each.manifest.programs[0]) for each in (before, after)]
    assert ids[0] == ids[1]


def test_what_is_read_of_a_folder_and_what_is_left_out_is_said_and_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, student = tmp_path / "data", tmp_path / "s"
    folder.mkdir()
    lines(folder / "train_a.jsonl")
    lines(folder / "validate_a.jsonl", 5, first=500)
    (folder / "notes.txt").write_text(SECRET)
    left = {"notes.txt": "no data file"}
    taught = ("distill", "--teacher", TEACHER, "--tier", "nano-1", "--data", folder,
              "--held-out", folder, *QUICK)
    assert done(capfd, *taught, "-o", student)["data"] == {
        "files": ["train_a.jsonl"], "split": "train", "flaws": {},
        "left_out": {**left, "validate_a.jsonl": "validate"},
        "held_out": {"files": ["validate_a.jsonl"], "split": "validate",
                     "left_out": {**left, "train_a.jsonl": "train"}}}
    found = done(capfd, "eval", "nano-1", "--data", folder)
    assert (found["n"], found["files"]) == (5, ["validate_a.jsonl"])
    found = done(capfd, "eval", "nano-1", "--data", folder, "--split", "train", "--limit", "5")
    assert found["left_out"] == {**left, "validate_a.jsonl": "validate"}
    assert main(["eval", "nano-1", "--data", str(folder), "--limit", "5"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "validate_a.jsonl (split validate); left out: notes.txt (no data file)" in said
    shutil.move(folder / "train_a.jsonl", folder / "mine.jsonl")
    assert "choose one with --split validate" in refused(capfd, *taught, "-o", tmp_path / "t")


def test_the_teacher_answers_requests_without_labels_and_the_student_learns_from_it(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more.jsonl"
    asked = [json.loads(data.read_text("utf-8").splitlines()[0])["input"],  # which has a label
             *(f"play {SECRET} station {number}" for number in range(8))]
    more.write_text("".join(
        json.dumps({"task": "call", "input": text}) + "\n" for text in asked) + json.dumps(
        {"messages": [{"role": "system", "content": "call"},
                      {"role": "user", "content": "will it rain in Boston"}]}), "utf-8")
    found = done(capfd, "distill", "--teacher", TEACHER, "--tier", "nano-1", "--data", data,
                 "--unlabelled", more, "-o", tmp_path / "s", *QUICK)["data"]["unlabelled"]
    assert found == {"files": ["more.jsonl"], "split": None, "left_out": {}, "flaws": {},
                     "requests": 9, "answered": 9}
    assert "Record 1 of more.jsonl is empty" in refused(
        capfd, "eval", "nano-1", "--data", more)
    assert "no data at nothing" in refused(
        capfd, "distill", "--teacher", TEACHER, "--tier", "nano-1", "--data", data,
        "--unlabelled", tmp_path / "nothing", "-o", tmp_path / "t")


def test_a_student_learns_from_conversations_and_is_measured_on_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": [
        {"role": "system", "content": "call"}, {"role": "user", "content": f"play {SECRET} {i}"},
        {"role": "assistant", "content": "done"}, {"role": "user", "content": "and again"},
        {"role": "assistant", "content": f"done {i}"},
    ]}) + "\n" for i in range(60)), "utf-8")
    student = tmp_path / "s"
    done(capfd, "distill", "--teacher", TEACHER, "--tier", "nano-1", "--data", data, "-o", student,
         *QUICK)
    held_out = read(tmp_path / "s.run" / "held-out.jsonl")
    assert {example.task for example in held_out} == {"chat"}
    assert len(held_out) % 2 == 0  # conversations are held out whole
    found = done(capfd, "eval", student, "--data", tmp_path / "s.run" / "held-out.jsonl")
    assert set(found["metrics"]) == {"bits_per_byte"}
    assert found["n"] == len(held_out)


def test_what_is_longer_than_the_context_is_counted_and_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two conversations the last answer, in what is learnt from and in what is held out."""
    data, far, context = tmp_path / "chat.jsonl", f"{SECRET} " * 2000, 1024

    def write(path: Path, long: set[int]) -> Path:
        path.write_text("".join(json.dumps({"messages": [
            {"role": "user", "content": f"play {SECRET} {i}"},
            {"role": "assistant", "content": f"done {i}"},
            {"role": "user", "content": far if i in long else "and again"},
            {"role": "assistant", "content": f"done {i} again"},
        ]}) + "\n" for i in range(60)), "utf-8")
        return path

    out, learn = tmp_path / "s", ("distill", "--teacher", NANO, "--tier", "nano-1", *QUICK)
    rest, apart = split(read(write(data, {7})))
    assert Checkpoint.open(NANO).metadata.config.shape.context <= context
    held, taught = (int(each[0].place.rpartition(":")[2]) - 1 for each in (apart, rest))
    found = done(capfd, *learn, "--data", write(data, {held, taught}), "-o", out)
    assert found["data"]["flaws"] == {"too long": 2}
    assert found["too_long"] == 2
    kept = read(tmp_path / "s.run" / "held-out.jsonl")
    assert len(kept) == len(apart) - 1  # and can be measured on again
    assert main([*map(str, learn), "--data", str(data), "-o", str(tmp_path / "t")]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert SECRET not in said
    assert "Left out of chat.jsonl: 2 longer than the context (first chat.jsonl:" in said

    found = done(capfd, "quantize", out, "--qat", "--data", data, "-o", tmp_path / "q", *QUICK)
    assert found["data"]["flaws"] == {"too long": 2}
    done(capfd, "quantize", out, "--calibrate", data, "-o", tmp_path / "c")  # it reads pieces
    write(data, set(range(20)))
    for command in ((*learn, "-o", tmp_path / "u"),
                    ("quantize", out, "--qat", "-o", tmp_path / "w", *QUICK)):
        assert "20 are longer than the context (first chat.jsonl:1" in refused(
            capfd, *command, "--data", data)
        done(capfd, *command, "--data", data, "--tolerate", "0.3")
    data.write_text(json.dumps({"instruction": far, "output": "done"}), "utf-8")
    said = refused(capfd, "quantize", out, "--qat", "--data", data, "-o", tmp_path / "v", *QUICK)
    assert "Every example is longer than the context of 1024 tokens (first chat.jsonl:1)" in said
    assert not (tmp_path / "v").exists()


def test_of_several_splits_a_gate_measures_on_the_one_that_is_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "data", tmp_path / "n.cloister"
    folder.mkdir()
    lines(folder / "train.jsonl", 4)
    lines(folder / "mine.jsonl", 5)
    done(capfd, "quantize", NANO, "-o", tmp_path / "q")
    gate = ("export", tmp_path / "q", "-o", out, "--gate", "frame_exact>=0", "--gate-data", folder)
    assert "choose one with --split train" in refused(capfd, *gate)
    assert main([*map(str, gate), "--split", "train"]) == 0
    assert "To measure on: train.jsonl (split train)" in capfd.readouterr().err
    assert "has no split test" in refused(capfd, *gate, "--split", "test", "--force")
    assert "needs bounds" in refused(
        capfd, "export", tmp_path / "q", "-o", tmp_path / "m", "--split", "train")
    Bundle.open(out).verify()
    calibrated = ("quantize", NANO, "-o", tmp_path / "c", "--calibrate", folder)
    assert main([*map(str, calibrated)]) == 1  # mine and train: train is read, and is too little
    said = " ".join(capfd.readouterr().err.split())
    assert "To learn from: train.jsonl (split train); left out: mine.jsonl" in said
    assert "holds" in said


def test_calibration_data_that_is_empty_is_refused_and_in_another_language_does_no_harm(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "q"
    quantize = ("quantize", NANO, "--calibrate", texts, "-o", out)
    for content, sentence in (
        ("", "holds no examples"), ("\n \n", "holds no examples"),
        ('{"task": "story", "input": "a", "target": "b"}', "holds 9 tokens, and 256 are the least"),
    ):
        texts.write_text(content, "utf-8")
        assert sentence in refused(capfd, *quantize)
        assert not out.exists()
    words = ["лисица", "жила", "реки", "однажды", "увидела", "большого", "медведя", "мёд"]
    texts.write_text("".join(json.dumps({
        "task": "story", "input": f"{words[i]} {words[~i]}", "target": " ".join(words[i // 2:])
    }) + "\n" for i in range(8)), "utf-8")
    done(capfd, *quantize)
    done(capfd, "quantize", NANO, "-o", tmp_path / "plain")
    lost, plain = (
        done(capfd, "eval", path, "--data", data, "--limit", "10", "--against", NANO)["metrics"]
        for path in (out, tmp_path / "plain"))
    assert lost["mean_kld"] < 2 * plain["mean_kld"]


def test_a_bundle_and_its_checkpoint_have_the_same_scores(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done(capfd, "quantize", NANO, "-o", tmp_path / "q")
    done(capfd, "export", tmp_path / "q", "-o", tmp_path / "q.cloister")
    eager, program = (
        done(capfd, "eval", subject, "--data", data, "--limit", "30", "--against", NANO)["metrics"]
        for subject in (tmp_path / "q", tmp_path / "q.cloister")
    )
    for name in ("frame_exact", "intent_accuracy", "slot_f1"):
        assert eager[name] == pytest.approx(program[name], abs=0.04)
    assert eager["mean_kld"] == pytest.approx(program["mean_kld"], rel=0.2)


def test_several_models_make_a_scoreboard_and_a_picture(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = done(capfd, "eval", "nano-1", "pro", "--data", data, "--limit", "10",
                 "--picture", tmp_path / "board.png")
    assert [report["model"] for report in found["reports"]] == ["nano-1", "pro"]
    assert found["base"] == "pro"
    nano, pro = (report["metrics"]["intent_accuracy"] for report in found["reports"])
    assert found["divided"]["nano-1"]["intent_accuracy"] == pytest.approx(nano / pro)
    assert found["divided"]["pro"]["intent_accuracy"] == 1
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")
    assert main(["eval", "nano-1", "pro", "--data", str(data), "--limit", "10"]) == 0
    shown = capfd.readouterr().out
    assert "divided by pro" in " ".join(shown.split())


def test_an_evaluation_knows_every_task_by_the_format_of_its_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text(json.dumps(
        {"test": [["how much", "balance"]], "oos_test": [["why", "oos"]]}))
    (tmp_path / "data" / "b.jsonl").write_text(json.dumps(
        {"story": "x", "sections": ["It snowed. The king was cold. He slept."]}))
    lines(tmp_path / "data" / "c.jsonl", 3)
    found = done(capfd, "eval", "nano-1", "--data", tmp_path / "data")
    assert set(found["metrics"]) == {
        "intent.intent_accuracy", "intent.oos_recall", "story.bits_per_byte", "call.frame_exact",
        "call.frame_said", "call.intent_accuracy", "call.slot_f1",
    }
    assert set(found["errors"]) == set(found["metrics"])
    only = done(capfd, "eval", "nano-1", "--data", tmp_path / "data", "--task", "story")
    assert list(only["metrics"]) == ["bits_per_byte"]
    assert 0.5 < only["metrics"]["bits_per_byte"] < 20


def test_a_gate_that_is_not_kept_leaves_no_bundle(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done(capfd, "quantize", NANO, "-o", tmp_path / "q")
    said = refused(capfd, "export", tmp_path / "q", "-o", tmp_path / "n.cloister",
                   "--gate", "frame_exact>=1.1", "--gate-data", data)
    assert "frame_exact is" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


@pytest.mark.parametrize(("arguments", "said"), [
    (("eval", "nano-1", "--data", "absent"), "absent"),
    (("eval", "nowhere", "--data", "DATA"), "nowhere"),
    (("eval", "nano-1", "--data", "DATA", "--task", "other"), "no examples"),
    (("eval", NANO, "--data", "DATA", "--record"), "Only a bundle"),
    (("eval", "nano-1", "--data", "LONG"), "long.jsonl:1 has"),
    (("eval", "nano-1", "--data", "DATA", "--limit", "4", "--picture", "x.docx"), "no picture"),
    (("export", NANO, "-o", "OUT", "--gate", "top1"), "needs data"),
    (("export", NANO, "-o", "OUT", "--gate-data", "DATA"), "needs bounds"),
    (("export", NANO, "-o", "OUT", "--gate", "top1", "--gate-data", "DATA"), "list of bounds"),
    (("quantize", NANO, "-o", "OUT", "--data", "DATA"), "add --qat"),
    (("distill", "--teacher", "absent", "--tier", "nano-1", "--data", "DATA", "-o", "OUT"),
     "absent"),
    (("distill", "--teacher", NANO, "--tier", "pro", "--data", "DATA", "-o", "OUT"),
     "larger anywhere"),
    (("distill", "--teacher", NANO, "--tier", "nano-1", "--data", "DATA", "-o", "OUT", "--hard",
      "2"), "hard is 2"),
    (("distill", "--teacher", NANO, "--tier", "nano-1", "--data", "DATA", "-o", "OUT", "--draws",
      "0"), "draws is 0"),
    (("distill", "--teacher", NANO, "--tier", "nano-1", "--data", "self", "--unlabelled", "DATA",
      "-o", "OUT"), "leave it out with --data self"),
    (("distill", "--teacher", NANO, "--tier", "nano-1", "--data", "FLAWED", "-o", "OUT"),
     "flawed.jsonl:2 malformed"),
    (("distill", "--teacher", NANO, "--tier", "nano-1", "--data", "DATA", "-o", "OUT",
      "--held-out", "DATA"), "evaluation requests occur in the training data"),
    (("distill", "--teacher", NANO, "--tier", "nano-1", "--data", "LONG", "--held-out", "DATA",
      "-o", "OUT"), "longer than the context of 1024 tokens (first long.jsonl:1)"),
])
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(
    arguments: tuple[object, ...], said: str, tmp_path: Path, data: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flawed, long = tmp_path / "flawed.jsonl", tmp_path / "long.jsonl"
    flawed.write_text(data.read_text().replace("\n", f'\n{{"task": "{SECRET}"\n', 20))
    long.write_text(json.dumps({"task": "call", "input": f"{SECRET} " * 2000, "target": "x"}))
    places = {"DATA": data, "FLAWED": flawed, "LONG": long, "OUT": tmp_path / "out"}
    assert said in refused(capfd, *(places.get(str(a), a) for a in arguments))
    assert {path.name for path in tmp_path.iterdir()} <= {"flawed.jsonl", "long.jsonl", "out.run"}


def test_overlap_may_be_allowed_in_so_many_words(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done(capfd, "distill", "--teacher", NANO, "--tier", "nano-1", "--data", data, "--held-out",
         data, "--allow-overlap", "-o", tmp_path / "s", *QUICK)


def test_teachers_of_other_vocabularies_cannot_be_compared(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(NANO, other)
    text = (other / "tokenizer.json").read_text("utf-8")
    (other / "tokenizer.json").write_text(text.replace('"<|user|>"', '"<|usee|>"'), "utf-8")
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    said = refused(capfd, "eval", "nano-1", "--data", data, "--against", other, "--limit", "5")
    assert "different tokenizers" in said


def test_an_interrupted_distillation_goes_on_where_it_stopped(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with draws on disk; the signal comes in the middle of the fourth step."""
    command = ("distill", "--teacher", NANO, "--tier", "nano-1", "--data", data, "--draws", "8",
               "-o", tmp_path / "s", "--steps", "8", "--tokens", "512", "--micro", "256")
    gradient, calls = loop._Loop._gradient, []

    def interrupted(self: loop._Loop, *rest: Any) -> torch.Tensor:
        calls.append(rest)
        if len(calls) == 7:  # two batches a step
            signal.raise_signal(signal.SIGINT)
        return gradient(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_gradient", interrupted)
        assert main(list(map(str, command))) == 130
    assert "Traceback" not in capfd.readouterr().err
    metrics = tmp_path / "s.run" / "metrics.jsonl"
    first = metrics.read_text().splitlines()
    assert len(first) == 4
    assert not (tmp_path / "s").exists()
    assert done(capfd, *command)["steps"] == 8
    whole = metrics.read_text().splitlines()
    assert len(whole) == 8
    assert whole[:4] == first


def test_draws_that_cannot_serve_are_refused_before_the_teacher_reads(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("distill", "--teacher", NANO, "--tier", "nano-1", "--data", data, "--draws", "8",
               "-o", tmp_path / "s")
    assert "forward KL" in refused(capfd, *command, "--divergence", "js")
    assert "own answers" in refused(capfd, *command, "--own-answers", "0.5")
    assert not list(tmp_path.iterdir())


def test_what_a_loss_that_is_not_finite_left_behind_is_a_checkpoint(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, steps, schedule = loop._Loop._save, [], teach.TrainOptions.schedule

    def spoil(self: loop._Loop) -> None:
        save(self)
        steps.append(self.saved)
        with torch.no_grad():
            self.student.norm.weight[0] = float("nan")

    monkeypatch.setattr(loop._Loop, "_save", spoil)
    monkeypatch.setattr(teach.TrainOptions, "schedule", lambda self: replace(
        schedule(self), save_every=2))
    said = refused(capfd, "distill", "--teacher", NANO, "--tier", "nano-1", "--data", data,
                   "-o", tmp_path / "s", *QUICK, "--steps", "5")
    assert "step 3 is not finite" in said
    assert "state holds step 2" in said
    assert steps == [2]
    assert not (tmp_path / "s").exists()
    good = Checkpoint.open(tmp_path / "s.run" / "last-good")
    assert good.metadata.name == "nano-1"
    assert good.load().norm.weight.isfinite().all()


def test_what_is_made_of_private_data_is_its_owners_alone(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0o022)
    try:
        done(capfd, "vault", "init", "--provider", "keyfile")
        done(capfd, "distill", "--teacher", NANO, "--tier", "nano-1", "--data", data, "--draws",
             "4", "--private", "-o", tmp_path / "s", *QUICK)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    made = [path for place in ("s", "s.run") for path in (
        tmp_path / place, *(tmp_path / place).rglob("*"))]
    assert len(made) > 10
    for path in made:
        assert path.stat().st_mode & 0o077 == 0, path
        assert SECRET.encode() not in (path.read_bytes() if path.is_file() else b"")
    assert not (tmp_path / "s.run" / "held-out.jsonl").exists()
    assert not (tmp_path / "s.run" / "logits").exists()
    assert "add --draws" in refused(
        capfd, "distill", "--teacher", NANO, "--tier", "nano-1", "--data", data, "--private", "-o",
        tmp_path / "other")


def test_two_processes_of_torchrun_make_one_student(tmp_path: Path, data: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                "--standalone", "-m", "cloister.cli"]
    command = ["distill", "--teacher", str(NANO), "--tier", "nano-1", "--data", str(data), "--json",
               "--float32", "-o", *QUICK]
    losses = []
    for name, runner in (("two", torchrun), ("one", [sys.executable, "-m", "cloister.cli"])):
        found = subprocess.run(
            [*runner, *command[:-len(QUICK)], str(tmp_path / name), *QUICK], env=environment,
            stdout=subprocess.PIPE, check=True,
        )
        record = json.loads(found.stdout)  # one object, from one process
        assert record["identity"] == Checkpoint.open(tmp_path / name).identity
        losses.append(record["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
