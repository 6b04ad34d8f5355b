"""A build of ExecuTorch for phones, whose XNNPACK caches weights, gives golden answers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from tests.phone import android_library, old_export
from tests.phone.golden import spoken

from cloister import reference
from cloister.bundle import Bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(android_library.missing()),
                       reason=f"this machine lacks {android_library.missing()}"),
]

TIERS = ("nano-1", "nano-2", "pro", "ultra")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return android_library.build(tmp_path_factory.mktemp("android"))


@pytest.mark.parametrize("load", android_library.LOADS)
@pytest.mark.parametrize("tier", TIERS)
def test_every_golden_answer_of_a_bundle_is_given(runner: Path, tier: str, load: str) -> None:
    bundle = Bundle.open(reference.bundle_path(tier))
    asked = spoken(bundle)
    assert len(asked) == len(bundle.golden())
    assert android_library.answers(runner, bundle, asked, load) == [row.answer for row in asked]


@pytest.mark.parametrize("load", android_library.LOADS)
def test_an_export_that_lets_operators_read_freed_constants_is_found(
        runner: Path, tmp_path: Path, load: str) -> None:
    bundle = Bundle.open(reference.bundle_path("nano-1"))
    nano = old_export.bundle(tmp_path)
    if nano is None:
        pytest.skip("this checkout has no history, and so no old export")
    program = nano.path / nano.manifest.programs[0].file
    asked, said = spoken(bundle), list[str]()
    with contextlib.suppress(ChildProcessError):  # SIGSEGV, where the program is mapped
        said = android_library.answers(runner, bundle, asked, load, program)
    assert not [row for row, text in zip(asked, said, strict=False) if row.answer == text]
