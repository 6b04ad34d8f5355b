"""`cloister lab`: JupyterLab with private defaults, in the place of this process.

They lie as a configuration directory in CLOISTER_HOME, written anew at every start, that Jupyter
reads beside the user's own and before it; nothing of the user's is changed.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cloister.errors import SettingError
from cloister.files import disk_errors, whole_file
from cloister.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DEFAULTS", "explained", "start"]


@dataclass(frozen=True, kw_only=True)
class Default:
    """A setting of Jupyter's, a variable of the environment, or a setting of the page."""

    name: str
    value: object
    why: str
    page: str = ""  # the plugin that it is a setting of


_NEWS = "@jupyterlab/apputils-extension:notification"
DEFAULTS = (
    Default(name="ServerApp.ip", value="127.0.0.1", why="only this machine reaches the server"),
    Default(name="ServerApp.allow_remote_access", value=False,
            why="requests under another name for this machine are refused (DNS rebinding)"),
    Default(name="ServerApp.allow_unauthenticated_access", value=False,
            why="also an extension that forgot to ask for the token does not answer without it"),
    Default(name="ServerApp.answer_yes", value=True, why="Ctrl-C ends it at once"),
    Default(name="ServerApp.jpserver_extensions", value={"cloister_jupyter": True},
            why="the panel's server side is on"),
    Default(name="LabApp.news_url", value=None, why="no news are fetched"),
    Default(name="LabApp.check_for_updates_class", value="jupyterlab.NeverCheckForUpdate",
            why="nobody is asked for a newer version"),
    Default(name="LabApp.extension_manager", value="readonly",
            why="the list of extensions shows what is installed, and asks no registry"),
    Default(name="LanguageServerManager.autodetect", value=False,
            why="npm is not run to look for language servers, nor are those that would read cells"),
    Default(name="MultiKernelManager.kernel_manager_class",
            value="cloister_jupyter.kernels.PrivateKernelManager",
            why="IPython's history stays in memory; kernels are reached over Unix sockets, which "
                "other users of the machine cannot open, not over ports"),
    Default(name="JUPYTER_WIDGETS_ECHO", value="0",
            why="what is typed into widgets is not sent back to every page"),
    Default(name="DO_NOT_TRACK", value="1", why="libraries that heed it report nothing"),
    Default(name="HF_HUB_DISABLE_TELEMETRY", value="1", why="nor does Hugging Face's"),
    Default(name="fetchNews", value="false", page=_NEWS, why="the page does not ask for news"),
    Default(name="checkForUpdates", value=False, page=_NEWS, why="nor for updates"),
    Default(name="saveState", value=False, page="@jupyter-widgets/jupyterlab-manager:plugin",
            why="notebook files do not hold what widgets hold"),
)


def explained() -> str:
    """Return a table of the defaults, for people."""
    width = max(len(default.name) for default in DEFAULTS)
    return "\n".join((
        "JupyterLab with private defaults; the environment and the user's settings stay as they "
        "are:\n",
        *(f"  {default.name:<{width}}  {json.dumps(default.value)}\n"
          f"  {'':<{width}}  {default.why}" for default in DEFAULTS),
        "\nNo core file is written when a kernel crashes, and the panel asks browsers not to "
        "translate\nthe page. Checkpoints stay on: they hold what the notebook holds, and "
        "`cloister lab check`\nsearches both. What stands after `--` is given to Jupyter, and wins "
        "over all of these.",
        "\nSee also: cloister lab check NOTEBOOK"))


def start(folder: Path, *, port: int | None, browser: bool, more: Sequence[str]) -> NoReturn:
    """Become JupyterLab, which shows `folder`; its exit code is this process's.

    Raises:
        SettingError: it is not installed, or there is no such folder.
        OutputUnwritable, NotEnoughDisk: the defaults cannot be written.
    """
    ours = find_spec("cloister_jupyter")
    if ours is None or ours.origin is None or find_spec("jupyterlab") is None:
        raise SettingError(
            'JupyterLab is not installed; install it with `pip install "cloister[jupyter]"`.')
    if not folder.is_dir():
        raise SettingError(f"There is no folder {folder.name or folder}; name one to show.")
    config = Settings.from_environment().home / "jupyter"
    _write(config, {"LabApp.extra_labextensions_path": [
        str(Path(ours.origin).parent / "labextension")]})
    environment = {**os.environ, **{
        default.name: str(default.value) for default in DEFAULTS if default.name.isupper()}}
    environment["JUPYTER_CONFIG_PATH"] = os.pathsep.join(
        filter(None, (str(config), environment.get("JUPYTER_CONFIG_PATH"))))
    sys.stdout.flush()
    os.execve(sys.executable, [
        # -P: a module that lies in the current directory must not run in its place.
        sys.executable, "-P", "-m", "jupyterlab", f"--ServerApp.root_dir={folder.resolve()}",
        *([] if port is None else [f"--ServerApp.port={port}"]),
        *([] if browser else ["--no-browser"]), *more,
    ], environment)


def _write(folder: Path, also: dict[str, object]) -> None:
    """Write the defaults as Jupyter reads them."""
    server: dict[str, dict[str, object]] = {}
    traits = {each.name: each.value for each in DEFAULTS if "." in each.name}
    for name, value in {**traits, **also}.items():
        owner, trait = name.split(".")
        server.setdefault(owner, {})[trait] = value
    page: dict[str, dict[str, object]] = {}
    for default in DEFAULTS:
        if default.page:
            page.setdefault(default.page, {})[default.name] = default.value
    for name, content in (("jupyter_server_config.json", server),
                          ("labconfig/default_setting_overrides.json", page)):
        path = folder / name
        with disk_errors("the configuration for Jupyter"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path, private=True) as file:
            file.write(json.dumps(content, indent=1).encode())
