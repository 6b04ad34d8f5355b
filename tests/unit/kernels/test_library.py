"""The library is built once, and never loaded where it may be another's."""

from __future__ import annotations

import json
from pathlib import Path

import executorch
import pytest
from executorch.extension.pybindings import _portable_lib

from cloister_kernels.library import Builder, LibraryError


def builder(folder: Path, compiler: str = "c++") -> Builder:
    return Builder(
        folder=folder, executorch=Path(next(iter(executorch.__path__))), release="1",
        bindings=Path(_portable_lib.__file__), compiler=compiler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home") / "kernels"
    assert builder(path).find() is None
    builder(path).build()
    return path


def test_it_is_built_once_for_its_owner_alone(folder: Path) -> None:
    first = builder(folder).build()
    changed = first.stat().st_mtime_ns
    assert builder(folder).build() == builder(folder).find() == first
    assert first.stat().st_mtime_ns == changed
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.suffix for path in folder.iterdir()} == {".so", ".json"}


def test_another_release_or_compiler_has_a_library_of_its_own(folder: Path, tmp_path: Path) -> None:
    other = Builder(**{**builder(folder).__dict__, "release": "2"})
    assert other.find() is None
    compiler = tmp_path / "another"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo another && exit\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert builder(folder, str(compiler)).find() is None


@pytest.mark.parametrize("spoil", ["library", "digest", "no digest"])
def test_a_library_that_is_not_what_was_built_is_refused(
    folder: Path, tmp_path: Path, spoil: str
) -> None:
    copy = tmp_path / "kernels"
    copy.mkdir(mode=0o700)
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (library,) = copy.glob("*.so")
    digest = library.with_suffix(".json")
    if spoil == "library":
        with library.open("ab") as file:
            file.write(b"\0")
    elif spoil == "digest":
        digest.write_text(json.dumps({"sha256": "0" * 64}))
    else:
        digest.unlink()
    with pytest.raises(LibraryError, match="delete it"):
        builder(copy).build()


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    try:
        with pytest.raises(LibraryError, match="written to by others"):
            builder(folder).find()
    finally:
        folder.chmod(0o700)
    link = folder.with_name("link")
    link.symlink_to(folder)
    with pytest.raises(LibraryError, match="written to by others"):
        builder(link).find()
    link.unlink()


def test_without_a_compiler_or_with_one_that_fails_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="No C\\+\\+ compiler is named 'nowhere'"):
        builder(tmp_path / "a", "nowhere").build()
    failing = tmp_path / "failing"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho no such flag >&2\nexit 1\n')
    failing.chmod(0o755)
    with pytest.raises(LibraryError, match="no such flag"):
        builder(tmp_path / "b", str(failing)).build()
    assert not list((tmp_path / "b").iterdir())
