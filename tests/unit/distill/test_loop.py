"""Training learns what it is told, survives kills, and does not depend on how many run it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister.distill import loop
from cloister.distill.data import Pair
from cloister.distill.loop import train
from cloister.distill.losses import Objective
from cloister.distill.optimizer import Kind
from cloister.distill.schedule import OnPolicy, Schedule
from cloister.distill.state import read_state, write_state, writing
from cloister.errors import (
    DataError,
    LossNotFinite,
    NotEnoughDisk,
    SettingError,
    TrainingError,
    VocabularyMismatch,
)
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.tiers import Shape

SHAPE = Shape(vocab_size=32, hidden_size=16, layers=2, heads=2, kv_heads=1, head_size=8,
              feed_forward=32, context=32, tied=True)
DATA: list[Pair] = [([1, i, 2], [i, i, 3]) for i in range(4, 32)]
SCHEDULE = Schedule(steps=12, tokens=128, micro=64, warmup=3, save_every=5, peak=1e-2, dropout=0.1)
HERE = Path(__file__)


def fresh(seed: int = 0, **changes: int) -> Decoder:
    decoder = Decoder(ModelConfig(shape=replace(SHAPE, **changes)))
    decoder.initialize(seed)
    return decoder


def losses_of(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


SETTINGS = {
    "labels": {},
    "online": {"teacher": fresh(7), "objective": Objective(hard=0.5)},
    "own answers": {
        "teacher": fresh(7), "objective": Objective(hard=0.5),
        "on_policy": OnPolicy(share=0.4, limit=4),
    },
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_is_cut_and_started_again_gives_the_same_losses_and_weights(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SETTINGS[kind]
    whole = fresh()
    run = train(whole, DATA, SCHEDULE, tmp_path / "whole", metrics=tmp_path / "a", **given)
    learn = loop._Loop._learn

    def until_killed(self: object, number: int, *rest: object) -> bool:
        if number == 8:
            raise SystemExit
        return learn(self, number, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_learn", until_killed)
        with pytest.raises(SystemExit):
            train(fresh(), DATA, SCHEDULE, tmp_path / "cut", metrics=tmp_path / "b", **given)
    resumed = fresh()
    again = train(resumed, DATA, SCHEDULE, tmp_path / "cut", metrics=tmp_path / "b", **given)
    assert again.losses == run.losses
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") == run.losses
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
            train(fresh(), DATA, SCHEDULE, tmp_path / "state")
    assert read_state(tmp_path / "state")["losses"] == whole[:8]
    assert train(fresh(), DATA, SCHEDULE, tmp_path / "state").losses == whole
    assert signal.getsignal(signal.SIGINT) is before


def child(*arguments: str, torchrun: int = 0) -> list[str]:
    runner = ["-m", "torch.distributed.run", f"--nproc-per-node={torchrun}", "--standalone"]
    return [sys.executable, *(runner if torchrun else []), str(HERE), *arguments]


ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
}


def test_a_process_killed_at_any_moment_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    subprocess.run(child(str(tmp_path / "whole"), "60"), env=ENVIRONMENT, check=True)
    kills = 0
    for delay in (0.05, 0.15, 0.3, 0.6, 60):
        process = subprocess.Popen(child(str(tmp_path / "cut"), "60"), env=ENVIRONMENT)
        began = time.monotonic()
        # The first steps show that training runs: from there the kill comes at its own moment.
        while process.poll() is None and not (tmp_path / "cut.jsonl").exists():
            assert time.monotonic() - began < 120
            time.sleep(0.01)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    assert losses_of(tmp_path / "cut.jsonl") == losses_of(tmp_path / "whole.jsonl")


def alone_and_together(folder: Path, *arguments: str) -> tuple[list[float], list[float]]:
    """Losses of one process and of two."""
    subprocess.run(
        child(str(folder / "two"), *arguments, torchrun=2), env=ENVIRONMENT, check=True)
    subprocess.run(child(str(folder / "one"), *arguments), env=ENVIRONMENT, check=True)
    return losses_of(folder / "one.jsonl"), losses_of(folder / "two.jsonl")


@pytest.mark.parametrize("kind", Kind)
def test_two_processes_learn_what_one_learns(tmp_path: Path, kind: Kind) -> None:
    one, two = alone_and_together(tmp_path, "8", kind)
    assert len(one) == len(two) == 8
    assert one == pytest.approx(two, abs=1e-4)
    assert one[-1] < one[0]
    # And what two began, one can end.
    for name in ("one", "two"):
        subprocess.run(child(str(tmp_path / name), "12", kind), env=ENVIRONMENT, check=True)
    one, two = (losses_of(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 12
    assert one == pytest.approx(two, abs=1e-4)


def test_two_processes_learn_from_their_own_answers_what_one_learns(tmp_path: Path) -> None:
    one, two = alone_and_together(tmp_path, "6", Kind.MUON, "0.5")
    assert one == pytest.approx(two, abs=1e-4)


def test_training_lowers_the_loss_under_either_optimizer(tmp_path: Path) -> None:
    for kind in Kind:
        schedule = replace(SCHEDULE, steps=100, optimizer=kind)
        losses = train(fresh(), DATA, schedule, tmp_path / kind).losses
        assert losses[-1] < 0.5 * losses[0]


def test_a_student_comes_close_to_its_teacher_without_any_label(tmp_path: Path) -> None:
    teacher = fresh(3)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    losses = train(
        fresh(), DATA, replace(SCHEDULE, steps=200, dropout=0.0), tmp_path / "state",
        teacher=teacher, objective=Objective(hard=0.0), metrics=tmp_path / "metrics",
    ).losses
    assert losses[-1] < 0.2 * losses[0]
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_own_answers_come_only_in_the_last_phase_and_bring_the_student_closer(
    tmp_path: Path,
) -> None:
    teacher = fresh(3)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    train(
        fresh(), DATA, replace(SCHEDULE, steps=100, dropout=0.0), tmp_path / "state",
        teacher=teacher, objective=Objective(hard=0.0),
        on_policy=OnPolicy(share=0.5, limit=4), metrics=tmp_path / "metrics",
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics").read_text().splitlines()]
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
    held = read_state(tmp_path / "state")["weights"]
    for name, weight in good.named_parameters():
        assert torch.equal(held[name], weight), name


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
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written"):
        train(fresh(), DATA, SCHEDULE, tmp_path / "state",
              metrics=tmp_path / "no" / "metrics.jsonl")
    for number, error in ((errno.ENOSPC, NotEnoughDisk), (errno.EROFS, TrainingError)):
        with pytest.raises(error, match=r"^.*logits.*$"), writing(tmp_path / "logits"):
            raise OSError(number, os.strerror(number))


def test_a_full_disk_leaves_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(tmp_path / "state", {"losses": [1.0]})

    def full(held: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NotEnoughDisk, match="state"):
        write_state(tmp_path / "state", {"losses": [2.0]})
    assert read_state(tmp_path / "state") == {"losses": [1.0]}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04" + b"\0" * 50])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "my.state").write_bytes(content)
    with pytest.raises(TrainingError, match=r"my\.state"):
        train(fresh(), DATA, SCHEDULE, tmp_path / "my.state")


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
    assert not state.exists()


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
        fresh(), DATA, schedule, Path(f"{out}.state"), metrics=Path(f"{out}.jsonl"),
        teacher=fresh(7), objective=Objective(hard=0.5), on_policy=own,
    )


if __name__ == "__main__":
    main()
