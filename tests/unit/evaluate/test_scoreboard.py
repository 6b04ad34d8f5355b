"""Ratios say how much of a model another is worth."""

from pathlib import Path

import pytest

from cloister.errors import SettingError
from cloister.evaluate.scoreboard import check_picture, ratios, write_picture

METRICS = {
    "pro": {"exact": 0.8, "story.bits_per_byte": 1.5, "oos_recall": 0.0, "mean_kld": 0.1},
    "nano": {"exact": 0.6, "story.bits_per_byte": 2.0, "oos_recall": 0.5, "slot_f1": 1.0,
             "mean_kld": 0.2, "top1": 0.9, "flips": 0.1},
    "bad": {"exact": 0.0, "story.bits_per_byte": 0.0},
}


def test_scores_are_divided_bits_the_other_way_round_and_divergences_not_at_all() -> None:
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


@pytest.mark.parametrize("name", ["board.docx", "board", "absent/board.png", "folder.png"])
def test_a_file_that_no_picture_can_be_is_refused_before_any_work(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    for refuse in (check_picture, lambda path: write_picture(path, METRICS, "pro")):
        with pytest.raises(SettingError, match=Path(name).name):
            refuse(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_without_matplotlib_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SettingError, match=r"cloister\[train\]"):
        check_picture(tmp_path / "board.png")
