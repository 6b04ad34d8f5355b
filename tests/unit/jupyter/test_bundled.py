"""What the notebook package ships to browsers: nothing that loads anything from elsewhere."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import cloister_jupyter

PACKAGE = Path(str(cloister_jupyter.__file__)).parent
ROOT = Path(__file__).parents[3]
ADDRESS = re.compile(r"(?:https?:|wss?:)?//[\w.-]+\.[a-z]{2,}[^\s\"'`)]*")
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nobody fetches


def test_no_bundled_file_names_an_address() -> None:
    files = [path for path in PACKAGE.rglob("*")
             if path.suffix in (".js", ".css", ".html", ".json", ".mjs", ".svg")]
    assert {"remoteEntry", "lab"} <= {path.name.split(".")[0] for path in files}
    addresses = {
        (path.name, found) for path in files
        for found in ADDRESS.findall(path.read_text("utf-8"))
        if found != NAMESPACE}
    assert not addresses
    sizes = sum(path.stat().st_size for path in (PACKAGE / "labextension").rglob("*.*"))
    assert sizes < 50_000  # what JupyterLab has is not bundled again


def test_the_built_extension_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [built] = (PACKAGE / "labextension").glob("*/package.json")
    package = json.loads(built.read_text())
    source = json.loads((ROOT / "jupyter_ext" / "package.json").read_text())
    assert package["version"] == source["version"] == project["version"]
    entry = built.parent / package["jupyterlab"]["_build"]["load"]
    assert entry.is_file() and built.parent.name == package["name"]
