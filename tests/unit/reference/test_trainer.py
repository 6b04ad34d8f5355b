"""An encoder's training goes on where it was stopped, and keeps to its settings."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cloister.distill.loop import Run
from cloister.errors import LossNotFinite, SettingError, TrainingError
from cloister.reference import ctc, trainer
from cloister.reference.ctc import CtcModel
from cloister.reference.trainer import Batch, TrainerSettings, train

from .test_ctc import SMALL


@dataclass
class Noise:
    """A source of noise, the same by number."""

    identity: object = "noise"
    seconds: float = 0.0
    loud: float = 0.1
    first: int = 0

    @contextmanager
    def supply(self, first: int) -> Iterator["Noise"]:
        self.first = first
        yield self

    def __iter__(self) -> Iterator[Batch]:
        number = self.first
        while True:
            rng = torch.Generator().manual_seed(number)
            x_BN = torch.randn(4, SMALL.samples_per_vector * 20, generator=rng) * self.loud
            yield Batch(x=x_BN, texts=["ab", "a", "b", "aa"], tokens=[[1], [2], [3], [1, 1]])
            number += 1


def settings(steps: int, **changes: object) -> TrainerSettings:
    return TrainerSettings(**{"steps": steps, "warmup": 2, "covered": True, **changes})


def model(seed: int = 0) -> CtcModel:
    return CtcModel(SMALL, "ab", 8, seed)


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, parts = model(), tmp_path / "parts"
    run = train(whole, Noise(), settings(8), tmp_path / "whole")

    def stop(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if "step 3," in note:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model(), Noise(), settings(8), parts, progress=stop)
    kept = ctc.load(parts).state_dict()
    assert any(not torch.equal(kept[name], value) for name, value in whole.state_dict().items())
    other = model(seed=3)
    assert train(other, Noise(), settings(8), parts).losses == run.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_run_does_not_go_on_with_another_source_settings_or_beginning(tmp_path: Path) -> None:
    train(model(), Noise(), settings(2), tmp_path)
    for source, changed, origin in (
        (Noise("other"), settings(3), ""), (Noise(), settings(3, peak=1e-3), ""),
        (Noise(), settings(3), "another encoder"),
    ):
        with pytest.raises(SettingError, match="other settings or data"):
            train(model(), source, changed, tmp_path, origin=origin)
    assert len(train(model(), Noise(), settings(3), tmp_path).losses) == 3


def test_a_loss_that_is_not_finite_ends_the_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(LossNotFinite, match="lower the learning rate"):
        train(model(), Noise(loud=float("nan")), settings(2), tmp_path)


def test_scores_are_kept_at_the_end_of_a_run(tmp_path: Path) -> None:
    train(model(), Noise(), settings(2), tmp_path, measure=lambda _: {"clean": 0.5})
    assert '"clean": 0.5' in (tmp_path / trainer.REPORT).read_text("utf-8")
    assert len((tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()) == 1


def test_the_rate_rises_stays_and_falls_with_the_time_that_is_spent() -> None:
    plan = TrainerSettings(minutes=10, warmup=10, decay=0.4)
    rates = [plan.rate(Run(losses=[1.0] * steps, seconds=seconds))
             for steps, seconds in ((0, 0), (50, 60), (500, 300), (800, 480), (999, 600))]
    assert rates[0] == pytest.approx(plan.peak / 10)
    assert rates[1] == rates[2] == plan.peak
    assert rates[3] == pytest.approx(plan.peak / 2)
    assert rates[4] == pytest.approx(plan.peak * plan.final)


@pytest.mark.parametrize("changes", [
    {"minutes": 0.0}, {"minutes": float("nan")}, {"steps": 0}, {"warmup": 0}, {"decay": 1.5},
    {"peak": 0.0}])
def test_settings_out_of_bounds_are_refused_by_name(changes: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(changes))):
        TrainerSettings(**changes)  # type: ignore[arg-type]


def test_stripes_are_covered_with_the_mean_and_the_rest_stays() -> None:
    x_BCRW = torch.randn(5, 1, 80, 300)
    made = trainer._cover(x_BCRW, np.random.default_rng(0))
    changed = made != x_BCRW
    assert 0 < changed.float().mean() < 0.6
    means = x_BCRW.mean((1, 2, 3), keepdim=True).expand_as(made)
    torch.testing.assert_close(made[changed], means[changed])


def test_the_mean_of_the_weights_begun_from_and_reached_is_kept_and_measured(
    tmp_path: Path
) -> None:
    begun, reached, mean = model(seed=1), model(seed=1), model(seed=1)
    train(reached, Noise(), settings(2), tmp_path / "reached")
    measured: list[CtcModel] = []
    train(mean, Noise(), settings(2, mean=True), tmp_path / "mean",
          measure=lambda given: measured.append(given) or {})
    kept = ctc.load(tmp_path / "mean").state_dict()
    for name, value in begun.state_dict().items():
        wanted = (value + reached.state_dict()[name]) / 2
        torch.testing.assert_close(kept[name], wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(mean.state_dict()[name], kept[name])
    assert measured == [mean]
    # The state has what was reached, and the run goes on from that.
    longer = train(model(seed=1), Noise(), settings(3, mean=True), tmp_path / "mean")
    assert longer.losses == train(model(), Noise(), settings(3), tmp_path / "reached").losses
    # And where a run was stopped before the mean was written, repeating it writes that.
    train(model(seed=1), Noise(), settings(3), tmp_path / "stopped")
    train(model(seed=1), Noise(), settings(3, mean=True), tmp_path / "stopped")
    train(model(seed=1), Noise(), settings(3, mean=True), tmp_path / "whole")
    again, wanted = (ctc.load(tmp_path / name).state_dict() for name in ("stopped", "whole"))
    assert all(torch.equal(value, wanted[name]) for name, value in again.items())


def test_an_encoder_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    spells = CtcModel(SMALL, "ab", 8, pieces=[b"a"] * 8)
    with pytest.raises(TrainingError, match="of the same kind"):
        train(spells, Noise(), settings(2), tmp_path)
