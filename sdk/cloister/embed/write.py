"""The directory that an app developer pastes from, written whole."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from typing import TYPE_CHECKING

from cloister.embed import android, cpp, ios, react_native
from cloister.embed.facts import facts_of
from cloister.embed.platforms import PLATFORMS
from cloister.errors import SettingError
from cloister.files import MARKS, whole_directory

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

    from cloister.bundle import Bundle
    from cloister.embed.facts import Facts

__all__ = ["embed"]

_MODULES = dict(zip(PLATFORMS, (android, ios, react_native, cpp), strict=True))


def embed(bundle: Bundle, platform: str, out: Path, *, replace: bool = False) -> Facts:
    """Write what an app for `platform` needs of `bundle` into the new directory `out`.

    Raises:
        SettingError: there is no such platform.
        EmbedError, BundleCorrupt: see `facts_of`.
        OutputExists, NotEnoughDisk, OutputUnwritable: see `cloister.files.whole_directory`.
    """
    if platform not in PLATFORMS:
        raise SettingError(f"Platforms are {', '.join(PLATFORMS)}; name one of them.")
    module, facts = _MODULES[platform], facts_of(bundle)
    size = bundle.manifest.size_bytes
    with whole_directory(out, kind="app", size_bytes=size, replace=replace) as directory:
        _copy(resources.files("cloister.embed") / "glue" / platform, directory)
        for name, text in module.constants(facts).items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        model = directory / module.MODEL
        model.mkdir(parents=True, exist_ok=True)
        for file in module.files(facts):
            shutil.copyfile(bundle.path / file.name, model / file.name)
        (directory / MARKS["app"]).write_text(json.dumps({
            "format": 1, "platform": platform, "name": facts.name, "cloister": facts.version,
            "executorch": facts.executorch, "program": facts.program.sha256,
        }, indent=1) + "\n", "utf-8")
    return facts


def _copy(source: Traversable, target: Path) -> None:
    for entry in source.iterdir():
        if entry.is_dir():
            if entry.name != "__pycache__":
                (target / entry.name).mkdir()
                _copy(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())
