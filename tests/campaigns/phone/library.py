"""The stock runner of a build for Android, run on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.phone import android_library, old_export
from tests.phone.golden import Spoken, continuations, same, spoken

from cloister.bundle import Bundle

WHERE = f"Android's x86-64 library in {android_library.PACKAGE} (ExecuTorch 1.2), stock runner"


def rows(bundles: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    if lacking := android_library.missing():
        yield "golden answers", WHERE, f"not run: this machine lacks {lacking}", "run"
        return
    with tempfile.TemporaryDirectory() as work:
        runner = android_library.build(Path(work))
        for path in bundles:
            bundle = Bundle.open(path)
            name, asked, steps = bundle.manifest.name, spoken(bundle), continuations(bundle)
            for load in android_library.LOADS:
                yield (f"golden answers of {name}", f"{WHERE}, {load}",
                       _same(runner, bundle, asked, load), "run")
            yield (f"tokens of golden answers of {name}, teacher-forced", WHERE,
                   _same(runner, bundle, steps, "file"), "run")
        before, nano = old_export.bundle(Path(work)), Bundle.open("nano-1")
        for load in android_library.LOADS:
            yield ("golden answers of nano-1, old export", f"{WHERE}, {load}",
                   "not run: this checkout has no history" if before is None else _same(
                       runner, nano, spoken(nano), load,
                       before.path / before.manifest.programs[0].file), "run")


def _same(runner: Path, bundle: Bundle, asked: Sequence[Spoken], load: str,
          program: Path | None = None) -> str:
    try:
        said = android_library.answers(runner, bundle, asked, load, program)
    except ChildProcessError as error:
        return str(error)
    return same(asked, [row.answer == text for row, text in zip(asked, said, strict=True)])
