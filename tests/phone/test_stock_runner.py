"""The wheel's own runner gives golden answers as on phones: XNNPACK's weights cache is on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.phone import wheel
from tests.phone.golden import spoken

from cloister import reference
from cloister.bundle import Bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(wheel.missing()), reason=f"this machine lacks {wheel.missing()}"),
]

LOADS = ("mapped", "file")  # FileDataLoader frees what it read


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stock")
    glue = wheel.embedded(Bundle.open(reference.bundle_path("nano-1")), directory)
    return wheel.build(glue, directory / "build") / "stock"


def answers(stock: Path, bundle: Bundle, load: str, cache: str = "on") -> list[str]:
    """Return what the runner says to golden prompts, in a process of its own.

    Raises:
        ChildProcessError: the process did not end well; the signal's name, or the code.
    """
    out = stock.parent / "answers"
    program = bundle.path / bundle.manifest.programs[0].file
    words = [word for each in spoken(bundle) for word in (str(each.tokens), each.prompt)]
    done = subprocess.run(
        [stock, program, bundle.tokenizer_path, load, cache, out, *words], capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ChildProcessError(
            signal.Signals(-done.returncode).name if done.returncode < 0 else done.returncode)
    return [text.decode() for text in out.read_bytes().split(b"\0")[:-1]]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("tier", ["nano-1", "nano-2", "pro", "ultra"])
def test_every_golden_answer_of_a_bundle_is_given(stock: Path, tier: str, load: str) -> None:
    bundle = Bundle.open(reference.bundle_path(tier))
    asked = spoken(bundle)
    assert len(asked) == len(bundle.golden())
    assert answers(stock, bundle, load) == [each.answer for each in asked]


@pytest.mark.parametrize("load", LOADS)
def test_an_export_that_lets_operators_read_freed_constants_fails(
        stock: Path, tmp_path: Path, load: str) -> None:
    old = wheel.old_bundle(tmp_path)
    if old is None:
        pytest.skip("this checkout has no history, and so no old export")
    wanted = [each.answer for each in spoken(old)]
    assert answers(stock, old, load, cache="off") == wanted
    said: object = None
    try:
        said = answers(stock, old, load)
    except ChildProcessError as error:
        wanted = str(error)
    assert said != wanted
    assert said or wanted == "SIGSEGV"
