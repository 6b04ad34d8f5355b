"""A notebook shows a bundle's receipt, and shows nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import make_bundle

from cloister import reference
from cloister.errors import BundleError
from cloister_jupyter import Receipt


def test_the_table_has_the_measured_numbers_in_both_forms() -> None:
    receipt = Receipt(reference.bundle_path("nano-1"))
    for text in (repr(receipt), receipt._repr_html_()):
        for part in ("2,328,192", "8da4w-g32", "nats a token", "%", "nano-1"):
            assert part in text


def test_the_table_reaches_out_to_nothing_and_escapes_what_it_shows(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bundle = make_bundle(tmp_path / "x.cloister", tokenizer_dir, name="<script>alert(1)</script>")
    html = Receipt(bundle.path)._repr_html_()
    assert "<script" not in html
    assert "http" not in html
    assert "&lt;script&gt;" in html


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Receipt(tmp_path)
