"""The wheel's own runner gives golden answers as on phones: XNNPACK's weights cache is on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.phone import cpp_glue, old_export
from tests.phone.cpp_glue import LOADS, stock_answers
from tests.phone.golden import spoken

from cloister import reference
from cloister.bundle import Bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cpp_glue.missing()), reason=f"this machine lacks {cpp_glue.missing()}"),
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stock")
    glue = cpp_glue.embedded(Bundle.open(reference.bundle_path("nano-1")), directory)
    return cpp_glue.build("stock", glue, directory / "build")


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("tier", ["nano-1", "nano-2", "pro", "ultra"])
def test_every_golden_answer_of_a_bundle_is_given(stock: Path, tier: str, load: str) -> None:
    bundle = Bundle.open(reference.bundle_path(tier))
    asked = spoken(bundle)
    assert len(asked) == len(bundle.golden())
    assert stock_answers(stock, bundle, load) == [each.answer for each in asked]


@pytest.mark.parametrize("load", LOADS)
def test_an_export_that_lets_operators_read_freed_constants_fails(
        stock: Path, tmp_path: Path, load: str) -> None:
    old = old_export.bundle(tmp_path)
    if old is None:
        pytest.skip("this checkout has no history, and so no old export")
    wanted = [each.answer for each in spoken(old)]
    assert stock_answers(stock, old, load, cache="off") == wanted
    try:
        said: object = stock_answers(stock, old, load)
    except ChildProcessError as error:
        said = str(error)
    assert said == "SIGSEGV" or (isinstance(said, list) and said != wanted)
