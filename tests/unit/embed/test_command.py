"""`cloister embed`: a directory written whole, once, and told of by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloister.bundle import Bundle
from cloister.cli import main
from cloister.embed.platforms import PLATFORMS


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_file_that_is_told_of_is_there_and_none_is_of_the_machine(
    platform: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "app"
    assert main(["embed", "nano-1", "--for", platform, "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == {
        str(path.relative_to(out)): path.stat().st_size
        for path in out.rglob("*") if path.is_file()}
    program = Bundle.open("nano-1").manifest.programs[0].file
    assert "README.md" in told["files"] and any(
        name.endswith(program) for name in told["files"])
    for path in out.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()


def test_what_is_there_already_stays_unless_it_is_to_be_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    embed = ["embed", "nano-1", "--for", "cpp", "-o", str(tmp_path / "app")]
    assert main(embed) == 0
    (tmp_path / "app" / "README.md").write_text("mine")
    assert main(embed) == 1
    assert "app exists already" in capsys.readouterr().err
    assert (tmp_path / "app" / "README.md").read_text() == "mine"
    assert main([*embed, "--force"]) == 0
    assert (tmp_path / "app" / "README.md").read_text() != "mine"
    assert main(["embed", "nano-1", "--for", "cpp", "-o", str(tmp_path / "mine.txt")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app", "mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_bundle_that_cannot_be_embedded_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "app"
    assert main(["embed", str(tmp_path), "--for", "ios", "-o", str(out)]) == 1
    assert "is no bundle" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit):  # the parser's own refusal names the platforms
        main(["embed", "nano-1", "--for", "windows", "-o", str(out)])
    assert "react-native" in capsys.readouterr().err
