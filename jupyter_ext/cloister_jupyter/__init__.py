"""Cloister in notebooks: tiers side by side, a conversation, and a bundle's receipt in plots.

The names here are loaded when they are first used: a Jupyter server takes the extension alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from cloister_jupyter.cases import Template, load_table, read_table
    from cloister_jupyter.chat import ChatWidget
    from cloister_jupyter.checks import Judge
    from cloister_jupyter.grid import Grid, Plan
    from cloister_jupyter.kept import Kept
    from cloister_jupyter.lab import PromptLab
    from cloister_jupyter.receipt import ReceiptView

__all__ = [
    "ChatWidget",
    "Grid",
    "Judge",
    "Kept",
    "Plan",
    "PromptLab",
    "ReceiptView",
    "Template",
    "load_table",
    "read_table",
]

_HOMES = {
    "ChatWidget": "chat", "Grid": "grid", "Judge": "checks", "Kept": "kept", "Plan": "grid",
    "PromptLab": "lab", "ReceiptView": "receipt", "Template": "cases", "load_table": "cases",
    "read_table": "cases",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension/cloister-jupyter", "dest": "cloister-jupyter"}]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "cloister_jupyter.server"}]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add `%%cloister` and `%cloister_status`; called by `%load_ext cloister_jupyter`."""
    from cloister_jupyter.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """End the magics' processes; called by `%unload_ext cloister_jupyter`."""
    from cloister_jupyter.magics import unload

    unload(shell)
