"""Training learns what it is told, survives kills, and does not depend on how many run it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister.distill import loop
from cloister.distill.losses import Objective
from cloister.distill.parallel import Parallel, Sharded
from cloister.distill.schedule import Kind, OnPolicy, Schedule, TrainSettings
from cloister.distill.state import Record, read_record, save_state
from cloister.errors import (
    DataError,
    LossNotFinite,
    NotEnoughDisk,
    OutputUnwritable,
    SettingError,
    TrainingError,
    VocabularyMismatch,
)
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.pairs import Pair
from cloister.tiers import Shape

SHAPE = Shape(vocab_size=32, hidden_size=16, layers=2, heads=2, kv_heads=1, head_size=8,
              feed_forward=32, context=32, tied=True)
DATA: list[Pair] = [([1, i, 2], [i, i, 3]) for i in range(4, 32)]
SCHEDULE = Schedule(steps=12, tokens=128, micro=64, warmup=3, save_every=5, peak=1e-2, dropout=0.1)
LONG = replace(SCHEDULE, dropout=0.0, save_every=500)
HERE = Path(__file__)


def fresh(seed: int = 0, **changes: int) -> Decoder:
    decoder = Decoder(ModelConfig(shape=replace(SHAPE, **changes)))
    decoder.initialize(seed)
    return decoder


def train(
    student: Decoder, data: list[Pair], schedule: Schedule, folder: Path, *,
    teacher: Decoder | None = None, origin: str = "", **settings: object,
) -> loop.Run:
    """With labels alone, unless something else is said."""
    folder.mkdir(exist_ok=True)
    settings = {"objective": Objective(hard=1.0), **settings}
    return loop.train(
        student, data, TrainSettings(schedule=schedule, **settings), folder, teacher=teacher,
        origin=origin)


def losses_of(path: Path) -> list[float]:
    return [line["loss"] for line in lines_of(path)]


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


SETTINGS = {
    "labels": {},
    "online": {"teacher": fresh(7), "objective": Objective(hard=0.5)},
    "own answers": {
        "teacher": fresh(7), "objective": Objective(hard=0.5),
        "on_policy": OnPolicy(share=0.4, limit=4),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_is_cut_and_started_again_gives_the_same_losses_and_weights(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SETTINGS[kind]
    whole = fresh()
    run = train(whole, DATA, SCHEDULE, tmp_path / "whole", **given)
    learn = loop._Loop._learn

    def until_killed(self: object, number: int, *rest: object) -> bool:
        if number == 8:
            raise SystemExit
        return learn(self, number, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_learn", until_killed)
        with pytest.raises(SystemExit):
            train(fresh(), DATA, SCHEDULE, tmp_path / "cut", **given)
    resumed = fresh()
    again = train(resumed, DATA, SCHEDULE, tmp_path / "cut", **given)
    assert again.losses == run.losses
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut") == run.losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_an_interrupted_run_keeps_every_step_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, before = loop._Loop._learn, signal.getsignal(signal.SIGINT)

    def interrupted(self: object, number: int, *rest: object) -> bool:
        if number == 7:
            signal.raise_signal(signal.SIGINT)
        return learn(self, number, *rest)  # type: ignore[arg-type]

    whole = train(fresh(), DATA, SCHEDULE, tmp_path / "whole").losses
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(fresh(), DATA, SCHEDULE, tmp_path / "run")
    record = read_record(tmp_path / "run" / "state")
    assert record is not None and record.losses == whole[:8]
    assert train(fresh(), DATA, SCHEDULE, tmp_path / "run").losses == whole
    assert signal.getsignal(signal.SIGINT) is before


def child(*arguments: str, torchrun: int = 0) -> list[str]:
    runner = ["-m", "torch.distributed.run", f"--nproc-per-node={torchrun}", "--standalone"]
    return [sys.executable, *(runner if torchrun else []), str(HERE), *arguments]


ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
}


@pytest.mark.slow
def test_a_process_killed_at_any_moment_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    """Also while it saves, which it does at every third of 60 steps."""
    subprocess.run(child(str(tmp_path / "whole"), "60"), env=ENVIRONMENT, check=True)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    for kill_at in (1, 17, 30):  # lines; when it is seen, the process is a little further
        process = subprocess.Popen(child(str(tmp_path / "cut"), "60"), env=ENVIRONMENT)
        began = time.monotonic()
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < kill_at:
            assert process.poll() is None
            assert time.monotonic() - began < 120
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert len(losses_of(tmp_path / "cut")) < 60
    subprocess.run(child(str(tmp_path / "cut"), "60"), env=ENVIRONMENT, check=True)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_at_any_moment_of_saving_leaves_a_state_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the last thing was that reached the disk."""
    whole = train(fresh(), DATA, SCHEDULE, tmp_path / "whole").losses
    for moment in ("shutil.rmtree", "os.fsync", "pathlib.Path.rename", "pathlib.Path.write_bytes"):
        folder, calls = tmp_path / moment, []

        def killed(*_: object, calls: list[int] = calls, **__: object) -> None:
            calls.append(1)
            raise SystemExit

        train(fresh(), DATA, replace(SCHEDULE, decay=0.0, steps=5), folder)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(moment, killed)
            train(fresh(), DATA, replace(SCHEDULE, decay=0.0, steps=10), folder)
        assert calls
        record = read_record(folder / "state")
        assert record is not None and len(record.losses) >= 5
        again = train(fresh(), DATA, replace(SCHEDULE, decay=0.0), folder).losses
        assert again == train(
            fresh(), DATA, replace(SCHEDULE, decay=0.0), tmp_path / "flat").losses
    assert len(whole) == 12


def run_with(world: int, folder: Path, *arguments: str) -> list[float]:
    """Losses of a run of `world` processes in `folder`."""
    command = child(str(folder), *arguments, torchrun=world if world > 1 else 0)
    subprocess.run(command, env=ENVIRONMENT, check=True)
    return losses_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "worlds"), [(Kind.MUON, (2, 4, 1)), (Kind.ADAMW, (1, 2))])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, kind: Kind, worlds: tuple[int, ...]
) -> None:
    """To the losses of one."""
    whole = run_with(1, tmp_path / "whole", "12", kind)
    assert whole[-1] < whole[0]
    for number, world in enumerate(worlds, start=1):
        steps = 12 * number // len(worlds)
        losses = run_with(world, tmp_path / "other", str(steps), kind)
        assert losses == pytest.approx(whole[:steps], abs=1e-4)


@pytest.mark.slow
def test_two_processes_learn_from_their_own_answers_what_one_learns(tmp_path: Path) -> None:
    one, two = (run_with(world, tmp_path / str(world), "6", Kind.MUON, "0.5") for world in (1, 2))
    assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.slow
def test_training_lowers_the_loss_under_either_optimizer(tmp_path: Path) -> None:
    for kind in Kind:
        schedule = replace(SCHEDULE, steps=60, optimizer=kind, save_every=100)
        losses = train(fresh(), DATA, schedule, tmp_path / kind).losses
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_a_student_comes_close_to_its_teacher_without_any_label(tmp_path: Path) -> None:
    teacher = fresh(3)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    losses = train(
        fresh(), DATA, replace(LONG, steps=150), tmp_path / "state",
        teacher=teacher, objective=Objective(hard=0.0),
    ).losses
    assert losses[-1] < 0.2 * losses[0]
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


@pytest.mark.slow
def test_own_answers_come_only_in_the_last_phase_and_bring_the_student_closer(
    tmp_path: Path,
) -> None:
    teacher = fresh(3)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    train(
        fresh(), DATA, replace(LONG, steps=100), tmp_path / "state",
        teacher=teacher, objective=Objective(hard=0.0),
        on_policy=OnPolicy(share=0.5, limit=4),
    )
    lines = lines_of(tmp_path / "state")
    assert [line["on_policy"] for line in lines] == [False] * 50 + [True] * 50
    own = [line["divergence"] for line in lines[50:]]
    assert sum(own[-10:]) < sum(own[:10])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = fresh()
    train(good, DATA, replace(SCHEDULE, steps=10, decay=0.0), tmp_path / "good")
    learn = loop._Loop._learn

    def poisoned(self: loop._Loop, number: int, *rest: object) -> bool:
        if number == 11:
            with torch.no_grad():
                self.student.norm.weight[0] = float("nan")
        return learn(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop._Loop, "_learn", poisoned)
    with pytest.raises(LossNotFinite, match=r"step 12 .*first numbers \d+.* holds step 10"):
        train(fresh(), DATA, replace(SCHEDULE, decay=0.0), tmp_path / "state")
    kept = Sharded(fresh(seed=1), Parallel())
    assert loop.restore(kept, tmp_path / "state")
    for name, weight in good.named_parameters():
        assert torch.equal(kept.decoder.get_parameter(name), weight), name


@pytest.mark.slow
def test_a_run_may_be_made_longer_before_its_decay_but_not_otherwise_changed(
    tmp_path: Path,
) -> None:
    flat = replace(SCHEDULE, decay=0.0)
    train(fresh(), DATA, flat, tmp_path / "state")
    longer = replace(flat, steps=20)
    whole = train(fresh(), DATA, longer, tmp_path / "whole").losses
    assert train(fresh(), DATA, longer, tmp_path / "state").losses == whole
    for other in (replace(longer, peak=1e-3), replace(longer, seed=1), replace(longer, decay=0.9)):
        with pytest.raises(SettingError, match="other settings"):
            train(fresh(), DATA, other, tmp_path / "state")
    for data in (DATA[1:], [*DATA[:-1], ([1, 2], [3])], DATA[::-1]):
        with pytest.raises(SettingError, match="other settings"):
            train(fresh(), data, longer, tmp_path / "state")
    taught = {"objective": Objective(hard=0.5)}
    train(fresh(), DATA, flat, tmp_path / "taught", teacher=fresh(7), **taught)
    with pytest.raises(SettingError, match="other settings"):
        train(fresh(), DATA, flat, tmp_path / "taught", teacher=fresh(8), **taught)
    with pytest.raises(SettingError, match="other settings"):
        train(fresh(), DATA, longer, tmp_path / "state", origin="cut out of another")
    with pytest.raises(SettingError, match="other settings"):
        train(fresh(feed_forward=16), DATA, longer, tmp_path / "state")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputUnwritable, match=r"metrics\.jsonl cannot be written"):
        loop.train(
            fresh(), DATA, TrainSettings(schedule=SCHEDULE, objective=Objective(hard=1.0)),
            tmp_path / "no")


@pytest.mark.parametrize(("number", "error"), [
    (errno.ENOSPC, NotEnoughDisk), (errno.EROFS, OutputUnwritable)])
def test_a_disk_that_fails_leaves_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    tensors = {"weights.layers.0.x": torch.ones(4), "weights.norm.weight": torch.zeros(2)}

    def record(steps: int) -> Record:
        return Record(
            identity="x", phase=(0.1, False), losses=[1.0] * steps, seconds=1.0, tokens=5)

    save_state(tmp_path / "state", record(1), tensors, Parallel())

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(error, match="state"):
        save_state(tmp_path / "state", record(2), tensors, Parallel())
    assert read_record(tmp_path / "state") == record(1)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["00000001"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no record", "record", "no weights", "weights", "a file"])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    run, state = tmp_path / "run", tmp_path / "run" / "state"
    train(fresh(), DATA, SCHEDULE, run)
    (kept,) = state.iterdir()
    weights = sorted(kept.glob("*.safetensors"))[0]
    if damage == "a file":
        shutil.rmtree(state)
        state.write_bytes(b"PK")
    elif damage.startswith("no"):
        (kept / "run.json" if damage == "no record" else weights).unlink()
    elif damage == "record":
        (kept / "run.json").write_text("{")
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TrainingError, match="state cannot be read"):
        train(fresh(), DATA, SCHEDULE, run)


def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    state, teacher = tmp_path / "state", fresh()
    with pytest.raises(SettingError, match="no teacher"):
        train(fresh(), DATA, SCHEDULE, state, objective=Objective(hard=0.5))
    with pytest.raises(SettingError, match="needs a teacher"):
        train(fresh(), DATA, SCHEDULE, state, on_policy=OnPolicy())
    with pytest.raises(VocabularyMismatch, match="40 tokens and the student 32"):
        train(fresh(), DATA, SCHEDULE, state, teacher=fresh(vocab_size=40),
              objective=Objective())
    with pytest.raises(SettingError, match="no labels"):
        OnPolicy(objective=Objective(hard=0.5))
    with pytest.raises(DataError, match="no examples"):
        train(fresh(), [], SCHEDULE, state, teacher=teacher)
    assert not (state / "state").exists()


@pytest.mark.parametrize(("name", "value"), [
    ("steps", 0), ("tokens", 0), ("warmup", -1), ("weight_decay", -0.1), ("save_every", 0),
    ("peak", 0.0), ("peak", float("nan")), ("weight_decay", float("nan")), ("dropout", 1.1),
    ("decay", 1.5), ("final", -1.0), ("clip", 0.0),
])
def test_a_schedule_outside_its_bounds_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"{name} is"):
        replace(SCHEDULE, **{name: value})


def test_the_rate_rises_holds_and_falls() -> None:
    schedule = Schedule(steps=1000, warmup=10, peak=1e-2, decay=0.4, final=0.02)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[:10] == sorted(rates[:10])
    assert set(rates[10:600]) == {1e-2}
    assert rates[600:] == sorted(rates[600:], reverse=True)
    assert rates[-1] == pytest.approx(2e-4, rel=0.2)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(SettingError, match="seed"):
        Schedule(seed=seed)


def main() -> None:
    """A run in a process of its own: where, steps, optimizer, share of own answers."""
    given = sys.argv[1:]
    out, steps, kind, share = (*given, *(None, None, Kind.MUON, "0")[len(given):])
    schedule = replace(
        SCHEDULE, steps=int(str(steps)), tokens=256, micro=128, save_every=3, dropout=0.0,
        decay=0.0, autocast=False, optimizer=Kind(str(kind)), peak=2e-3,
    )
    own = OnPolicy(share=float(str(share)), limit=4) if float(str(share)) else None
    train(
        fresh(), DATA, schedule, Path(str(out)), teacher=fresh(7), objective=Objective(hard=0.5),
        on_policy=own,
    )


if __name__ == "__main__":
    main()
