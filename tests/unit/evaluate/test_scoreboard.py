"""Ratios say how much of a model another is worth."""

from pathlib import Path

import pytest

from cloister.errors import SettingError
from cloister.evaluate.scoreboard import ratios, write_picture

METRICS = {
    "pro": {"exact": 0.8, "story.bits_per_byte": 1.5, "new": 0.0},
    "nano": {"exact": 0.6, "story.bits_per_byte": 2.0, "new": 0.5, "own": 1.0},
    "bad": {"exact": 0.0, "story.bits_per_byte": 0.0},
}


def test_scores_are_divided_and_bits_the_other_way_round() -> None:
    divided = ratios(METRICS, "pro")
    assert divided["pro"] == {"exact": 1, "story.bits_per_byte": 1}
    assert divided["nano"] == {"exact": pytest.approx(0.75), "story.bits_per_byte": 0.75}
    assert divided["bad"] == {"exact": 0}


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture_shows_every_model(tmp_path: Path, kind: str) -> None:
    write_picture(tmp_path / f"board.{kind}", METRICS, "pro")
    content = (tmp_path / f"board.{kind}").read_bytes()
    assert len(content) > 5000
    if kind == "svg":
        assert all(f"<!-- {name} -->".encode() in content for name in METRICS)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"board\.docx"):
        write_picture(tmp_path / "board.docx", METRICS, "pro")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SettingError, match=r"cloister\[train\]"):
        write_picture(tmp_path / "board.png", METRICS, "pro")
