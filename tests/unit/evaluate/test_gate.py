"""A gate lets through what keeps its bounds, and says what does not."""

import pytest

from cloister.errors import GateFailed, SettingError
from cloister.evaluate.gate import check, parse

METRICS = {"mean_kld": 0.015, "top1": 0.96, "call.frame_exact": 0.8}


@pytest.mark.parametrize("text", [
    "mean_kld<=0.02", "mean_kld <= 2e-2 , top1>=0.95", "mean_kld<=0.015",
    "call.frame_exact>=0.8",
])
def test_bounds_that_are_kept_pass(text: str) -> None:
    check(parse(text), METRICS)


@pytest.mark.parametrize(("text", "said"), [
    ("mean_kld<=0.01", r"mean_kld is 0\.015, and the gate asks for <= 0\.01"),
    ("top1>=0.95,top1>=0.97", r"top1 is 0\.96, and the gate asks for >= 0\.97"),
])
def test_a_bound_that_is_broken_is_named_with_both_values(text: str, said: str) -> None:
    with pytest.raises(GateFailed, match=said):
        check(parse(text), METRICS)


def test_a_metric_that_is_nan_passes_no_bound() -> None:
    for text in ("x<=1", "x>=0"):
        with pytest.raises(GateFailed):
            check(parse(text), {"x": float("nan")})


@pytest.mark.parametrize("text", [
    "", ",", "top1", "top1>0.9", "top1=0.9", "top1>=", "top1>=high", "top1>=0.9,", "top1>=nan",
    "top1>=1e", ">=0.9", "top1>=0.9;kld<=1",
])
def test_a_gate_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="list of bounds"):
        parse(text)


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are() -> None:
    with pytest.raises(SettingError, match=r"top5 .* call\.frame_exact, mean_kld, top1"):
        check(parse("top5>=0.9"), METRICS)


def test_a_bound_knows_whether_it_needs_another_model() -> None:
    bounds = parse("mean_kld<=1,ppl_ratio<=1,flips<=1,top1>=0,call.frame_exact>=0,exact>=0")
    assert [bound.between_two for bound in bounds] == [True] * 4 + [False] * 2
