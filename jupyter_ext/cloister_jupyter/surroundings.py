"""How a Jupyter server is set up, and what that means for the privacy of what passes through it."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any

import msgspec
from jupyterlab_server.config import get_federated_extensions
from traitlets.utils.importstring import import_item

from cloister.settings import Settings
from cloister_jupyter.badge import evidence
from cloister_jupyter.kernels import PrivateKernelManager

if TYPE_CHECKING:
    from jupyter_server.serverapp import ServerApp

    from cloister.runtime.protocol import Welcome

__all__ = ["Audit", "Fact", "audit", "closed_to_others"]

# What the extra `jupyter` of the package brings, and Notebook 7.
_KNOWN_PAGES = {
    "cloister-jupyter", "anywidget", "@jupyter-widgets/jupyterlab-manager", "jupyterlab_pygments",
    "@jupyter-notebook/lab-extension"}
_KNOWN_SERVERS = {
    "cloister_jupyter", "jupyterlab", "jupyter_lsp", "jupyter_server_terminals", "notebook_shim",
    "notebook"}


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """Something that holds or does not; None where it is neither good nor bad."""

    name: str
    value: str
    good: bool | None


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of one part."""

    name: str
    facts: tuple[Fact, ...]


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What holds, in a line and by parts."""

    summary: str
    good: bool
    groups: tuple[Group, ...]


def audit(app: ServerApp, welcome: Welcome) -> Audit:
    """Return what holds for a server, and for the processes that it starts for models and vault."""
    guard = tuple(
        Fact(name=name, value=value, good=welcome.guard_tier == 2 if name == "guard tier" else None)
        for name, value in evidence(welcome))
    groups = (
        Group(name="This server", facts=(*_server(app), *_lab(app), *_kernels(app), *_others(app))),
        Group(name="Processes of models and vault", facts=guard),
        Group(name="What is not guarded", facts=(Fact(
            name="this page, this server and the kernels", good=None,
            value="What is typed and answered passes through their memory. They have a network, "
                  "which code in cells and other extensions may use."),)),
    )
    bad = [fact.name for group in groups for fact in group.facts if fact.good is False]
    return Audit(groups=groups, good=not bad, summary=(
        f"Look at {len(bad)} thing{'s' * (len(bad) > 1)}: {', '.join(bad)}." if bad else
        "Only this machine reaches this server, it fetches nothing, and models have no network."))


def closed_to_others(app: ServerApp) -> bool:
    """Tell whether nobody can read along what passes between page and server, nor ask it."""
    return bool(app.identity_provider.auth_enabled) and (_is_local(app) or bool(app.certfile))


def _is_local(app: ServerApp) -> bool:
    if app.sock:
        return True
    try:
        found = socket.getaddrinfo(app.ip or "0.0.0.0", None, type=socket.SOCK_STREAM)
        return all(ipaddress.ip_address(place[4][0]).is_loopback for place in found)
    except (OSError, ValueError):  # a name that nobody knows
        return False


def _server(app: ServerApp) -> list[Fact]:
    local, asks = _is_local(app), bool(app.identity_provider.auth_enabled)
    return [
        Fact(name="reachable", good=local, value=(
            "from this machine alone" if local else f"from other machines, at {app.ip or '*'}")),
        Fact(name="token", good=asks, value=(
            "asked for" if asks else "not asked for: every program here can use this server")),
    ]


def _lab(app: ServerApp) -> list[Fact]:
    apps = app.extension_manager.extension_apps.get("jupyterlab", ())
    lab: Any = next(iter(apps), None)
    if lab is None:
        return []
    news = lab.news_url is not None
    updates = lab.check_for_updates_class.__name__ != "NeverCheckForUpdate"
    manager = str(lab.extension_manager)
    return [
        Fact(name="news", good=not news, value=(
            "may be fetched from jupyterlab.github.io" if news else "never fetched")),
        Fact(name="updates", good=not updates, value=(
            "looked for at pypi.org" if updates else "never looked for")),
        Fact(name="extension manager", good=manager == "readonly", value=(
            "lists what is installed" if manager == "readonly" else f"asks {manager}")),
    ]


def _kernels(app: ServerApp) -> list[Fact]:
    private = issubclass(
        import_item(app.kernel_manager.kernel_manager_class), PrivateKernelManager)
    passphrase = [] if Settings.from_environment().passphrase is None else [
        Fact(name="passphrase", good=False, value=(
            "the vault's stands in CLOISTER_PASSPHRASE, where every kernel and extension reads it; "
            "unset it, and unlock the vault here"))]
    return [*passphrase, Fact(name="kernels", good=None, value=(
        "IPython's history stays in memory; kernels are reached over Unix sockets where paths are "
        "short enough" if private else
        "IPython keeps what stands in cells in history.sqlite (what is typed into the lab is in no "
        "cell); kernels are reached over ports of this machine. `cloister lab` does neither."))]


def _others(app: ServerApp) -> list[Fact]:
    apps = app.extension_manager.extension_apps.get("jupyterlab", ())
    places = [place for each in apps
              for place in (*each.extra_labextensions_path, *each.labextensions_path)]
    names = (set(get_federated_extensions(places)) - _KNOWN_PAGES) | (
        {name for name, on in app.jpserver_extensions.items() if on} - _KNOWN_SERVERS)
    return [Fact(name="other extensions", good=None, value=(
        f"{', '.join(sorted(names))}: nobody has looked at what they send" if names else "none"))]
