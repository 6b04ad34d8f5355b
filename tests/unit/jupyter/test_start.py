"""`cloister lab`: how JupyterLab is started, without starting it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cloister import cli
from cloister.commands import start
from cloister.settings import Settings


class Started(Exception):
    """In the place of the other program."""


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What would have been started: arguments and environment."""
    seen = []

    def become(_program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        seen.append((list(arguments), dict(environment)))
        raise Started

    monkeypatch.setattr(os, "execve", become)
    monkeypatch.setattr(start, "find_spec", lambda name: type(
        "Spec", (), {"origin": f"/somewhere/{name}/__init__.py"}))
    return seen


def test_what_the_table_says_is_what_jupyter_is_told(
    begun: list[tuple[list[str], dict[str, str]]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/theirs")
    with pytest.raises(SystemExit):
        cli.main(["lab", "--help"])
    said = capsys.readouterr().out
    with pytest.raises(Started):
        cli.main(["lab", "--debug", "--port", "9", "--no-browser", str(tmp_path), "--",
                  "--allow-root", "--", "x"])
    [(arguments, environment)] = begun
    assert arguments[1:] == [
        "-P", "-m", "jupyterlab", f"--ServerApp.root_dir={tmp_path}", "--ServerApp.port=9",
        "--no-browser", "--allow-root", "--", "x"]
    ours = Settings.from_environment().home / "jupyter"
    assert environment["JUPYTER_CONFIG_PATH"] == f"{ours}{os.pathsep}/theirs"
    server = json.loads((ours / "jupyter_server_config.json").read_text())
    page = json.loads((ours / "labconfig" / "default_setting_overrides.json").read_text())
    for default in start.DEFAULTS:
        assert f"  {default.name} " in said and default.why in said
        owner, _, trait = default.name.rpartition(".")
        given = page[default.page] if default.page else server[owner] if owner else environment
        assert given[trait] == default.value
    assert server["LabApp"]["extra_labextensions_path"] == [
        "/somewhere/cloister_jupyter/labextension"]


def test_bad_input_is_refused_by_name_before_anything_is_written(
    begun: list[tuple[list[str], dict[str, str]]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["lab", str(tmp_path / "none")]) == 1
    assert "no folder none" in capsys.readouterr().err
    for arguments in (["lab", "--port", "65536"], ["lab", "--port", "x"], ["lab", "a", "b"]):
        with pytest.raises(SystemExit) as refused:
            cli.main(arguments)
        assert refused.value.code == 2
    for missing in ("jupyterlab", "cloister_jupyter"):
        monkeypatch.setattr(start, "find_spec", lambda name, missing=missing: (
            None if name == missing else type("Spec", (), {"origin": "/a/b"})))
        assert cli.main(["lab", str(tmp_path)]) == 1
        assert 'pip install "cloister[jupyter]"' in capsys.readouterr().err
    assert not begun and not (Settings.from_environment().home / "jupyter").exists()
