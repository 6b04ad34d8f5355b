"""The next token is drawn as the settings say, and the same seed draws the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cloister.errors import IncompatibleProgram, SettingError
from cloister.runtime.chat import Sampling
from cloister.runtime.sampling import Sampler


def draws(sampling: Sampling, logits: list[float], n: int = 400) -> set[int]:
    sampler, row = Sampler(sampling), torch.tensor(logits)
    return {sampler.choose(row, []).id for _ in range(n)}


def test_greedy_takes_the_best_and_of_equal_ones_the_lowest_id() -> None:
    assert Sampler(Sampling()).choose(torch.tensor([0.0, 2.0, 2.0, 1.0]), []).id == 1


def test_every_likely_token_is_drawn_and_no_impossible_one() -> None:
    assert draws(Sampling(temperature=1.0, seed=1), [0.0, 0.0, 0.0, float("-inf")]) == {0, 1, 2}


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=2))
    row = torch.tensor([0.7, 0.2, 0.1]).log()
    counts = [0, 0, 0]
    for _ in range(4000):
        counts[sampler.choose(row, []).id] += 1
    assert abs(counts[0] / 4000 - 0.7) < 0.04
    assert abs(counts[2] / 4000 - 0.1) < 0.03


def test_top_k_keeps_the_k_best() -> None:
    assert draws(Sampling(temperature=1.0, top_k=2, seed=3), [1.0, 3.0, 2.0, 0.0]) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert draws(Sampling(temperature=1.0, top_p=0.75, seed=4), row) == {0, 1}
    assert draws(Sampling(temperature=1.0, top_p=0.01, seed=4), row) == {0}


def test_min_p_keeps_what_has_that_share_of_the_best() -> None:
    row = torch.tensor([0.6, 0.3, 0.1]).log().tolist()
    assert draws(Sampling(temperature=1.0, min_p=0.4, seed=5), row) == {0, 1}


def test_a_low_temperature_sharpens() -> None:
    assert draws(Sampling(temperature=0.01, seed=6), [1.0, 0.5, 0.0]) == {0}


def test_the_penalty_turns_away_from_what_was_said() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    assert sampler.choose(torch.tensor([3.0, 2.0]), [0]).id == 1
    assert sampler.choose(torch.tensor([-1.0, -1.5]), [0]).id == 1
    assert sampler.choose(torch.tensor([3.0, 2.0]), []).id == 0


def test_log_probabilities_are_the_models_own() -> None:
    row = torch.tensor([0.5, 0.3, 0.2]).log()
    choice = Sampler(Sampling(temperature=5.0, top_k=1, seed=1)).choose(row, [], top=2)
    assert choice.logprob == pytest.approx(float(row[0]), abs=1e-6)
    assert [id_ for id_, _ in choice.top] == [0, 1]
    assert choice.top[1][1] == pytest.approx(float(row[1]), abs=1e-6)


@pytest.mark.parametrize("bad", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
    {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"min_p": -0.1},
    {"repetition_penalty": 0.0}, {"seed": -1}, {"seed": 1.5}, {"top_k": 2.5},
    {"temperature": "hot"}, {"top_p": None},
])
def test_a_value_out_of_bounds_is_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_more_alternatives_than_tokens_are_refused() -> None:
    with pytest.raises(SettingError, match="top"):
        Sampler(Sampling()).choose(torch.zeros(3), [], top=4)


def test_the_same_seed_draws_the_same_in_another_process() -> None:
    code = (
        "import torch\n"
        "from cloister.runtime.chat import Sampling\n"
        "from cloister.runtime.sampling import Sampler\n"
        "sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=11))\n"
        "row = torch.randn(500, generator=torch.Generator().manual_seed(3))\n"
        "drawn = [sampler.choose(row, []).id for _ in range(50)]\n"
    )
    here: dict[str, list[int]] = {}
    exec(code, here)
    run = subprocess.run(
        [sys.executable, "-c", f"{code}print(drawn)"], capture_output=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path)})
    assert run.stdout.decode().strip() == str(here["drawn"])


class Mask:
    """A constraint that stays the same."""

    finished = False

    def __init__(self, *allowed: bool) -> None:
        self.mask, self.masks = torch.tensor(allowed), 0

    def allowed(self) -> torch.Tensor:
        self.masks += 1
        return self.mask

    def permits(self, id_: int) -> bool:
        return bool(self.mask[id_])

    def accept(self, id_: int) -> None:
        assert self.permits(id_)


def test_a_mask_leaves_only_what_it_allows_and_the_models_own_log_probabilities() -> None:
    row = torch.tensor([3.0, 2.0, 1.0, 0.0])
    mask = Mask(False, True, False, True)
    greedy = Sampler(Sampling()).choose(row, [], top=1, constraint=mask)
    assert greedy.id == 1
    assert greedy.logprob == pytest.approx(float(row.log_softmax(-1)[1]))
    assert greedy.top[0][0] == 0
    sampler = Sampler(Sampling(temperature=5.0, top_p=0.99, seed=1))
    assert {sampler.choose(row, [], constraint=mask).id for _ in range(200)} == {1, 3}
    penalized = Sampler(Sampling(repetition_penalty=9.0))
    assert penalized.choose(row, [1], constraint=Mask(False, True, False, False)).id == 1


def test_greedily_no_mask_is_made_where_the_best_token_is_allowed() -> None:
    row, mask = torch.tensor([3.0, 2.0, 1.0, 0.0]), Mask(True, False, True, False)
    assert Sampler(Sampling()).choose(row, [], constraint=mask).id == 0
    assert mask.masks == 0


@pytest.mark.parametrize("bad", [
    [0.0, float("nan")], [float("inf"), 0.0], [float("-inf"), float("-inf")],
])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: list[float], temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=1))
    with pytest.raises(IncompatibleProgram, match="finite"):
        sampler.choose(torch.tensor(bad), [])


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert draws(Sampling(temperature=temperature, seed=1), [3.0, 80.0, -7.0], n=20) == {1}
