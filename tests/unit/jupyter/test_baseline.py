"""Receipts stand side by side, and each failure beside the row that speaks of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cloister import family
from cloister.bundle import Bundle, rewrite_receipt
from cloister.errors import BundleError
from cloister_jupyter.baseline import WHOLE, said, side_by_side, speaks_of

NANO = family.bundle_path("nano-1")


def test_a_bundle_without_evaluations_stands_beside_one_that_has_them(tmp_path: Path) -> None:
    other = tmp_path / "nano-1.cloister"
    shutil.copytree(NANO, other)
    rewrite_receipt(Bundle.open(other), {"evaluations": [], WHOLE: {"mean_kld": None}})
    receipt = Bundle.open(NANO).receipt()
    lost, reports = receipt[WHOLE]["mean_kld"], receipt["evaluations"]
    frames, tales = reports["call, development"], reports["story, development"]
    value, error = (frames[of]["frame_exact"] for of in ("metrics", "errors"))
    rows = {name: pair for name, *pair in side_by_side(NANO, other)}
    assert rows["recipe"] == ["8da4w-g32", "8da4w-g32"]
    assert rows["evaluations: call, development: frame_exact"] == [
        f"{value:.1%} \u00b1 {error:.1%}", "\u2013"]
    assert rows["evaluations: story, development: bits_per_byte"][0].startswith(
        f"{tales['metrics']['bits_per_byte']:.3f} \u00b1")
    assert rows[f"{WHOLE}: mean_kld"] == [f"{lost:.2g} nats a token", "\u2013"]
    with pytest.raises(BundleError):
        side_by_side(NANO, tmp_path / "none.cloister")


@pytest.mark.parametrize(("task", "fields", "name"), [
    ("call", ("name", "arguments.city"), "evaluations: call, development: intent_accuracy"),
    ("call", ("arguments.city",), "evaluations: call, development: slot_f1"),
    ("call", (), "evaluations: call, development: frame_exact"),
    ("redact", (), "evaluations: redact, development: exact"),
    ("red", (), f"{WHOLE}: mean_kld"), ("", (), f"{WHOLE}: mean_kld")])
def test_a_failure_has_its_row_of_the_receipt(
    task: str, fields: tuple[str, ...], name: str
) -> None:
    assert speaks_of(said(NANO), task, fields) == name
