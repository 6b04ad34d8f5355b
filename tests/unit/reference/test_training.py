"""Training learns the answers only, and a kill costs nothing but time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cloister.errors import SettingError
from cloister.model.config import ModelConfig
from cloister.model.transformer import Decoder
from cloister.reference import training
from cloister.reference.training import Pair, Schedule, train
from cloister.tiers import Shape

SHAPE = Shape(vocab_size=32, hidden_size=16, layers=1, heads=2, kv_heads=1, head_size=8,
              feed_forward=32, context=16, tied=True)
DATA: list[Pair] = [([1, i, 2], [i, i, 3]) for i in range(4, 32)]
SCHEDULE = Schedule(steps=12, tokens=64, warmup=3, save_every=5)


def fresh() -> Decoder:
    decoder = Decoder(ModelConfig(shape=SHAPE))
    decoder.initialize(0)
    return decoder


class KilledError(Exception):
    pass


def test_a_run_that_is_killed_and_started_again_gives_the_same_losses_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh()
    losses = train(whole, DATA, SCHEDULE, tmp_path / "whole").losses
    learn, steps = training._learn, iter(range(8))

    def until_killed(*given: object) -> float:
        if next(steps, None) is None:
            raise KilledError
        return learn(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "_learn", until_killed)
        with pytest.raises(KilledError):
            train(fresh(), DATA, SCHEDULE, tmp_path / "cut")
    resumed = fresh()
    run = train(resumed, DATA, SCHEDULE, tmp_path / "cut")
    assert run.losses == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(fresh(), DATA, SCHEDULE, tmp_path / "state")
    monkeypatch.delattr(training, "_learn")
    assert train(fresh(), DATA, SCHEDULE, tmp_path / "state") == run


def test_the_state_of_another_schedule_is_refused(tmp_path: Path) -> None:
    train(fresh(), DATA, SCHEDULE, tmp_path / "state")
    with pytest.raises(SettingError, match="another schedule"):
        train(fresh(), DATA, replace(SCHEDULE, peak=1e-3), tmp_path / "state")


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses = train(
        fresh(), DATA, replace(SCHEDULE, steps=120, peak=1e-2), tmp_path / "state"
    ).losses
    assert losses[-1] < 0.5 * losses[0]


def test_only_tokens_of_the_answer_are_learnt() -> None:
    (tokens, labels), *_ = training._batches([([1, 9, 2], [7, 3]), ([1, 2], [3])], SCHEDULE)
    shown = sorted(
        (row[mask].tolist(), row[~mask].tolist())
        for row, mask in zip(tokens, labels != training.IGNORE, strict=True)
    )
    assert shown == [([3], [1, 2, 0, 0]), ([7, 3], [1, 9, 2])]


def test_each_pass_holds_every_example_once_in_batches_within_the_limit() -> None:
    batches = list(training._batches(DATA, replace(SCHEDULE, steps=3)))  # 28 examples, 10 a batch
    assert all(tokens.numel() <= SCHEDULE.tokens for tokens, _ in batches)
    seen = [row[1] for tokens, _ in batches for row in tokens.tolist()]
    assert sorted(seen) == list(range(4, 32))


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no examples"):
        train(fresh(), [], SCHEDULE, tmp_path / "state")


@pytest.mark.parametrize(("name", "value"), [
    ("steps", 0), ("tokens", 0), ("warmup", -1), ("weight_decay", -0.1), ("save_every", 0),
    ("peak", 0.0), ("peak", 1.0), ("peak", float("nan")), ("weight_decay", float("nan")),
])
def test_a_schedule_outside_its_bounds_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"{name} is"):
        replace(SCHEDULE, **{name: value})


def test_the_rate_rises_then_falls_to_a_twentieth() -> None:
    schedule = Schedule(steps=1000, warmup=10, peak=1e-2)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1e-2
    assert rates[-1] == pytest.approx(5e-4, rel=1e-3)
