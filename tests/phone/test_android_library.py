"""A build of ExecuTorch for phones gives a bundle's golden answers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.phone import android_library
from tests.phone.golden import spoken

from cloister import reference
from cloister.bundle import Bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(android_library.missing()), reason=f"it needs {android_library.missing()}"),
]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return android_library.build(tmp_path_factory.mktemp("android"))


@pytest.mark.parametrize("load", android_library.LOADS)
@pytest.mark.parametrize("tier", ["nano-1", "nano-2", "pro", "ultra"])
def test_the_golden_answers_of_a_bundle_are_given(runner: Path, tier: str, load: str) -> None:
    bundle = Bundle.open(reference.bundle_path(tier))
    asked = spoken(bundle)
    (program,) = bundle.manifest.programs
    assert len(asked) == len(bundle.golden())
    assert android_library.answers(
        runner, bundle.path / program.file, bundle.tokenizer_path, asked, load
    ) == [each.answer for each in asked]
