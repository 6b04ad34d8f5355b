"""Directories come from the environment, or from the platform."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.settings import Settings


def test_the_environment_names_home_and_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLOISTER_DATA", str(tmp_path / "data"))
    settings = Settings.from_environment()
    assert settings.home == tmp_path / "home"
    assert settings.data == tmp_path / "data"
    assert settings.seen_programs.parent == settings.home


def test_without_it_home_lies_where_the_platform_keeps_user_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CLOISTER_HOME")
    monkeypatch.delenv("CLOISTER_DATA", raising=False)
    settings = Settings.from_environment()
    assert settings.home.name == "cloister"
    assert settings.data is None
