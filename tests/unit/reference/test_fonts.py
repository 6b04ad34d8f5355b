"""The families of fonts are free, apart from one another where they should be, and checked."""

import tarfile
from pathlib import Path

import matplotlib
import pytest

from cloister.errors import DataError
from cloister.reference import fonts
from cloister.reference.fonts import Face, Kind, faces, families

FREE = {"OFL-1.1", "Apache-2.0", "UFL-1.0", "Unlicense"}
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def test_every_family_is_free_and_of_one_version() -> None:
    assert len(families()) > 150
    assert {family.licence for family in families()} <= FREE
    assert all(family.package.startswith("@fontsource/") for family in families())
    assert len({family.name for family in families()}) == len(families())


def test_no_family_is_held_out_whose_relative_is_trained_on() -> None:
    trained = {family.group for family in families(held_out=False)}
    never_seen = {family.group for family in families(held_out=True)}
    assert trained and never_seen and not trained & never_seen
    assert {family.kind for family in families(held_out=True)} == set(Kind)


def test_fonts_that_were_not_fetched_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="abeezee is not in"):
        faces(tmp_path, held_out=False)


def test_a_face_knows_which_characters_it_has() -> None:
    face = Face(family=families()[0], path=DEJAVU)
    assert face.draws("Total: £12.50 é")
    assert not face.draws("\u5b98")


def test_a_file_that_is_no_font_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x-latin-400-normal.woff2"
    path.write_bytes(b"no font")
    with pytest.raises(DataError, match="x-latin-400-normal"):
        Face(family=families()[0], path=path).at(20)


def test_a_package_gives_its_faces_and_licence_and_writes_nowhere_else(tmp_path: Path) -> None:
    family = families()[0]
    face = f"{family.name}-latin-400-normal.woff2"
    (tmp_path / "file").write_bytes(b"data")
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        for name in (f"package/files/{face}", "package/LICENSE", "../../outside",
                     "package/files/other.woff2"):
            archive.add(tmp_path / "file", name)
    fonts._unpack(tmp_path / "package.tgz", family, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {face, "LICENSE"}
    assert not (tmp_path.parent / "outside").exists()


def test_a_package_without_faces_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(tmp_path / "file", "package/LICENSE")
    with pytest.raises(DataError, match="holds no Latin face"):
        fonts._unpack(tmp_path / "package.tgz", families()[0], tmp_path / "new")
