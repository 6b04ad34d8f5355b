"""A notebook shows a bundle's receipt, and shows nothing else."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter
from tests.conftest import make_bundle

from cloister import family
from cloister.bundle import Bundle, rewrite_receipt
from cloister.errors import BundleError
from cloister.evaluate.scoreboard import ratios
from cloister_jupyter import ReceiptView
from cloister_jupyter.figures import scores, sizes

SVG = "{http://www.w3.org/2000/svg}"


def shown(view: ReceiptView) -> ET.Element:
    """The view as a tree: it is well-formed, so that no part of it can swallow another."""
    return ET.fromstring(view._repr_mimebundle_()["text/html"])


def numbers(root: ET.Element, caption: str) -> dict[str, list[str]]:
    """The cells of the table under a caption, by the name of the row."""
    table = next(each for each in root.iter("table") if caption in "".join(each[0].itertext()))
    return {row[0].text or "": [cell.text or "" for cell in row[1:]] for row in table.iter("tr")}


def changed(bundle: Bundle, **values: Any) -> Bundle:
    return rewrite_receipt(bundle, {**bundle.receipt(), **values})


def test_the_measured_numbers_are_in_both_forms() -> None:
    bundle = ReceiptView("nano-1")._repr_mimebundle_()
    same = Bundle.open("nano-1").receipt()["program_against_checkpoint"]["top1"]
    for text in bundle.values():
        for part in ("2,328,192", "8da4w-g32", "nats a token", f"{same:.2%}", "nano-1", "xnnpack"):
            assert part in text


@pytest.mark.parametrize("tier", ["ultra", "pro", "nano-2", "nano-1"])
def test_the_sizes_of_layers_and_of_the_rest_add_up_to_the_bundle(tier: str) -> None:
    manifest = Bundle.open(family.bundle_path(tier)).manifest
    rows = sizes(manifest)
    assert len(rows) == manifest.shape.layers + 6
    assert sum(sum(parts) for _, parts in rows) == manifest.size_bytes
    bits = {"8da8w": 8.0, "8da4w-g32": 4.5}[manifest.recipe]
    held = dict(rows)
    others = {"rest", "tokenizer", "encoder"}
    weights = sum(sum(parts) for name, parts in rows if not others & set(name.split()))
    scales = 4 * 6 * (  # of rows, where the body is in 8 bits
        2 * manifest.shape.heads * 32 + 2 * manifest.shape.kv_heads * 32
        + 2 * manifest.shape.feed_forward + manifest.shape.hidden_size
        + manifest.shape.hidden_size - manifest.shape.heads * 32)
    assert weights == manifest.shape.weight_bytes(body_bits=bits) + (scales if bits == 8 else 0)
    assert held["layer 1"] == held["layer 6"]
    assert 0 < sum(held["rest of the program"]) < 0.2 * manifest.size_bytes


def test_scores_are_divided_by_pros_and_each_has_its_number() -> None:
    root = shown(ReceiptView("nano-1"))
    pro, mine = (scores(Bundle.open(name).receipt())[0] for name in ("pro", "nano-1"))
    wanted = ratios({"pro": pro, "nano-1": mine}, "pro")["nano-1"]
    rows = numbers(root, "divided")
    assert len(rows) - 1 == len(wanted) > 8
    assert not any("written" in name for name in rows)
    of_pro, of_mine = (Bundle.open(name).receipt()["evaluations"]["call, development"]
                       for name in ("pro", "nano-1"))
    there, here = (each["metrics"]["frame_exact"] for each in (of_pro, of_mine))
    assert rows["call frame exact"] == [
        f"{here:.3f} ± {of_mine['errors']['frame_exact']:.3f}", f"{here / there:.3f}",
        f"{there:.3f}"]
    ours = wanted["story, development.bits_per_byte"]
    assert rows["story bits per byte"][1] == f"{ours:.3f}"  # the other way round: fewer are better
    assert ours < 1


def test_every_plot_says_its_numbers_to_a_screen_reader_and_in_a_table() -> None:
    root = shown(ReceiptView("nano-1", against="nano-2"))
    plots = [each for each in root.iter(f"{SVG}svg") if each.get("role") == "img"]
    assert len(plots) == 6  # sizes of both, divergence, its histograms of both, scores
    for plot in plots:
        assert (plot[0].tag, plot[1].tag) == (f"{SVG}title", f"{SVG}desc")
        assert plot[0].text
        assert "." in (plot[1].text or "")
    assert len(list(root.iter("details"))) == len(plots)
    divergence = numbers(root, "nats a token")
    lost = [Bundle.open(name).receipt()["program_against_checkpoint"] for name in (
        "nano-1", "nano-2")]
    largest = [f"{each['max_kld']:.2g}" for each in lost]
    assert divergence["largest"] == largest
    assert f"largest: {' and '.join(largest)}" in (plots[2][1].text or "")


def test_a_new_receipt_shows_its_histogram_and_where_it_was_measured(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bundle = make_bundle(tmp_path / "x.cloister", tokenizer_dir)
    changed(
        bundle, measured_on="Processor of the test", weights={"origin": None},
        program_against_checkpoint={"n": 3, "histogram": {"below 1e-08": 1, "1 and above": 2}},
        parts_against_checkpoint={"parts": 97, "constants_bytes": 4},
        against_parent={"reason": "the checkpoint names no parent"})
    view = ReceiptView(bundle.path)
    assert numbers(shown(view), "Tokens by")["1 and above"] == ["2"]
    for part in ("Processor of the test", "trained with Cloister", "97 parts",
                 "not measured: the checkpoint names no parent"):
        assert part in repr(view)


def test_what_a_receipt_lacks_is_said(bundle: Bundle) -> None:
    view = ReceiptView(bundle.path)
    assert repr(view).count("not in this receipt") == 7
    html = view.html()
    assert "not shown, the receipt has none" in html
    assert "not shown, the receipt has no scores" in html


@pytest.mark.parametrize("odd", [
    {"program_against_checkpoint": ["no", "object"], "evaluations": 3, "weights": "none"},
    {"program_against_checkpoint": {"mean_kld": "0.1", "n": True, "histogram": [1]}},
    {"evaluations": {"a": {"metrics": {"exact": None}}, "b": []}, "measured_on": 7},
    {"against_parent": {"program": {"mean_kld": []}, "reason": 5}, "weights": {"origin": {}}},
])
def test_a_receipt_of_another_hand_is_shown_as_far_as_it_is_one(
    bundle: Bundle, odd: dict[str, Any]
) -> None:
    view = ReceiptView(changed(bundle, **odd))
    shown(view)
    assert "not in this receipt" in repr(view)


def test_two_bundles_of_one_name_are_told_apart(tmp_path: Path, tokenizer_dir: Path) -> None:
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        make_bundle(tmp_path / folder / "x.cloister", tokenizer_dir)
    view = ReceiptView(tmp_path / "new/x.cloister", against=tmp_path / "old/x.cloister")
    assert "bundle: new/x | old/x" in repr(view)
    itself = ReceiptView(tmp_path / "new/x.cloister", against=tmp_path / "new/x.cloister")
    assert "bundle: new/x | new/x (baseline)" in repr(itself)


def test_the_view_reaches_out_to_nothing_runs_nothing_and_escapes_what_it_shows(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bad = "<script>alert(1)</script>"
    bundle = changed(
        make_bundle(tmp_path / "x.cloister", tokenizer_dir, name=bad), measured_on=bad,
        program_against_checkpoint={"n": 1, "histogram": {bad: 1}},
        evaluations={f"{bad}.call, development": {"metrics": {"frame_exact": 0.5}}})
    html = ReceiptView(bundle.path).html()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 3
    assert not re.search(r"<[^>]*\s(on\w+|href|src)=", html)
    assert html.replace("http://www.w3.org/2000/svg", "").count("http") == 0


def test_a_notebook_that_is_exported_as_a_page_has_the_plots() -> None:
    data = ReceiptView("nano-1")._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", data=data, execution_count=1)
    page, _ = HTMLExporter(template_name="lab").from_notebook_node(nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("ReceiptView('nano-1')", outputs=[output])]))
    assert page.count('<svg role="img"') == 4
    assert page.count("<summary>The numbers</summary>") == 4


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        ReceiptView(tmp_path)
