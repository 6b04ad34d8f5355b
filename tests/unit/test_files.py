"""What is written is there whole, or what stood there before still is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister import files
from cloister.errors import NotEnoughDisk, OutputExists, OutputUnwritable
from cloister.files import check_output, whole_directory, whole_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A bundle that is replaced."""
    path = tmp_path / "x.cloister"
    path.mkdir()
    (path / "manifest.json").write_text('{"format": 1}')
    return path


def replaced(path: Path) -> str:
    with whole_directory(path, kind="bundle", replace=True) as work:
        (work / "manifest.json").write_text("new")
    assert list(path.parent.iterdir()) == [path]
    return (path / "manifest.json").read_text()


def test_what_is_replaced_is_never_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Path] = []
    monkeypatch.setattr(Path, "rename", lambda self, target: moved.append(self))
    if not files._exchange(place, place):
        pytest.skip("this file system cannot exchange two entries in one step")
    assert replaced(place) == "new"
    assert moved == []


def test_a_system_that_cannot_exchange_replaces_in_two_steps(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda new, path: False)
    assert replaced(place) == "new"


def test_a_failure_between_the_two_steps_puts_the_old_one_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", lambda new, path: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputUnwritable, match="Input/output"):
        replaced(place)
    assert (place / "manifest.json").read_text() == '{"format": 1}'
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize(("number", "expected"), [(28, NotEnoughDisk), (30, OutputUnwritable)])
def test_a_file_that_cannot_be_finished_leaves_the_one_before(
    tmp_path: Path, number: int, expected: type[Exception]
) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(expected), whole_file(path) as file:
        file.write(b"new")
        raise OSError(number, "of the disk")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("manifest", [None, "{}", "[1]", "{", '{"manifest_version": 3}'])
def test_what_is_no_bundle_is_not_replaced(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "x").mkdir()
    if manifest is not None:  # as web extensions have one, too
        (tmp_path / "x" / "manifest.json").write_text(manifest)
    with pytest.raises(OutputExists, match="is no bundle"), whole_directory(
        tmp_path / "x", kind="bundle", replace=True
    ):
        pass


def test_an_output_that_nothing_could_hold_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in ("absent", "file"):
        with pytest.raises(OutputUnwritable, match=f"Directory {parent} does not exist"):
            check_output(tmp_path / parent / "x", kind="bundle", replace=False)
